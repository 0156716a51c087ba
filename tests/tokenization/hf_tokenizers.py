"""Small tokenizers of other model families, with templates of their formats."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

TEXTS = [
    "system user assistant question answer: what does json.dumps do? It serializes obj to a str.",
    '{"name": "lookup", "arguments": {"symbol": "json.dumps"}}\nHello there, 42 times.',
] * 10
CHATML = """\
{%- if tools %}<|im_start|>system
{% for tool in tools %}{{ tool | tojson(indent=None) }}
{% endfor %}<|im_end|>
{% endif %}
{%- for message in messages %}
  {{- '<|im_start|>' + message.role + '\\n' + message.content }}
  {%- for call in message.tool_calls or [] %}
    {{- '\\n<tool_call>\\n' + (call.function | tojson) + '\\n</tool_call>' }}
  {%- endfor %}
  {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}
"""
LLAMA = """\
{{- bos_token }}
{%- for message in messages %}
  {{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' + (message.content | trim) + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}
"""
INSTRUCT = """\
{{- bos_token }}
{%- for message in messages %}
  {%- if message.role == 'user' %}{{ '[INST] ' + message.content + ' [/INST]' }}
  {%- elif message.role == 'assistant' %}{{ ' ' + message.content + eos_token }}
  {%- else %}{{ raise_exception('only user and assistant') }}{% endif %}
{%- endfor %}
"""


def chatml(folder: Path, template: str = CHATML) -> Path:
    """As Qwen: byte-level, calls between tokens that are added but not special."""
    tokenizer = _byte_level(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    tokenizer.add_tokens(
        [AddedToken(mark, special=False, normalized=False) for mark in ("<tool_call>", "</tool_call>")]
    )
    return _save(tokenizer, folder, template, eos_token="<|im_end|>", pad_token="<|endoftext|>")


def llama(folder: Path) -> Path:
    """As Llama 3: byte-level, every chat behind a first token; the end of a turn is not that of a text."""
    marks = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    folder = _save(_byte_level(marks), folder, None, bos_token="<|begin_of_text|>", eos_token="<|end_of_text|>")
    (folder / "chat_template.jinja").write_text(LLAMA)
    return folder


def sentencepiece(folder: Path, **config: object) -> Path:
    """As Llama 2: words behind a low line, bytes as `<0x0A>`, no prompt for the model's turn."""
    model = models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    splits = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    return _pieces(model, None, splits, folder, **config)


def llama_2(folder: Path) -> Path:
    """As Llama 2's own file, which prefixes every piece; the class that it names prefixes the first."""
    model = models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    prefix = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    return _pieces(model, prefix, None, folder, tokenizer_class="LlamaTokenizer", legacy=False)


def gemma(folder: Path) -> Path:
    """As Gemma: no prefix."""
    model = models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    splits = pre_tokenizers.Split(" ", "merged_with_previous")
    return _pieces(model, normalizers.Replace(" ", "\u2581"), splits, folder, tokenizer_class="GemmaTokenizer")


def unigram(folder: Path) -> Path:
    """As the decoders of llm-jp: Unigram with bytes."""
    return _pieces(models.Unigram(), None, pre_tokenizers.Metaspace(prepend_scheme="first"), folder)


def _pieces(model: Any, normalizer: Any, splits: Any, folder: Path, **config: object) -> Path:
    tokenizer = Tokenizer(model)
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    if splits is not None:
        tokenizer.pre_tokenizer = splits
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = [AddedToken(mark, special=True, normalized=False) for mark in ("<unk>", "<s>", "</s>", "<pad>", "<mask>")]
    words = [AddedToken(f"<0x{byte:02X}>", special=False, normalized=False) for byte in range(256)]
    if isinstance(model, models.BPE):
        trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=[*special, *words], show_progress=False)
    else:
        trainer = trainers.UnigramTrainer(
            vocab_size=380, special_tokens=[*special, *words], unk_token="<unk>", show_progress=False
        )
    tokenizer.train_from_iterator(TEXTS, trainer)
    described = json.loads(tokenizer.to_str())
    described["added_tokens"] = [token for token in described["added_tokens"] if token["special"]][:5]
    described["model"]["byte_fallback"] = True
    tokenizer = Tokenizer.from_str(json.dumps(described))
    return _save(tokenizer, folder, INSTRUCT, bos_token="<s>", eos_token="</s>", unk_token="<unk>", **config)


LLAMA_TOOLS = """\
{{- bos_token }}
{%- if tools is defined and tools is not none %}
  {{- '<|start_header_id|>system<|end_header_id|>\\n\\nFunctions: ' }}
  {%- for tool in tools %}{{ tool | tojson(indent=4) }}{{ '\\n\\n' }}{% endfor %}
  {{- '<|eot_id|>' }}
{%- endif %}
{%- for message in messages %}
  {%- if message.role == 'tool' or message.role == 'ipython' %}
    {{- '<|start_header_id|>ipython<|end_header_id|>\\n\\n' }}
    {{- message.content | tojson if message.content is mapping else message.content }}{{ '<|eot_id|>' }}
  {%- elif 'tool_calls' in message %}
    {%- if message.tool_calls | length != 1 %}{{ raise_exception('only single tool-calls at once') }}{% endif %}
    {%- set call = message.tool_calls[0].function %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n{"name": "' + call.name + '", "parameters": ' }}
    {{- call.arguments | tojson }}{{ '}<|eot_id|>' }}
  {%- else %}
    {{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' + (message.content | trim) + '<|eot_id|>' }}
  {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}
"""
MISTRAL = """\
{{- bos_token }}
{%- set users = messages | selectattr('role', 'equalto', 'user') | list %}
{%- for message in messages %}
  {%- if message.role == 'user' %}
    {%- if tools is not none and message == users[-1] %}
      {{- '[AVAILABLE_TOOLS]' + tools | tojson + '[/AVAILABLE_TOOLS]' }}
    {%- endif %}
    {{- '[INST]' + message.content + '[/INST]' }}
  {%- elif message.tool_calls is defined and message.tool_calls is not none %}
    {{- '[TOOL_CALLS][' }}
    {%- for call in message.tool_calls %}
      {%- if call.id is not defined or call.id | length != 9 %}{{ raise_exception('nine characters') }}{% endif %}
      {{- (call.function | tojson)[:-1] + ', "id": "' + call.id + '"}' + (']' + eos_token if loop.last else ', ') }}
    {%- endfor %}
  {%- elif message.role == 'assistant' %}{{ message.content + eos_token }}
  {%- elif message.role == 'tool' %}
    {%- if message.tool_call_id is not defined or message.tool_call_id | length != 9 %}
      {{- raise_exception('ids have nine characters') }}
    {%- endif %}
    {{- '[TOOL_RESULTS]{"content": ' + message.content + ', "call_id": "' + message.tool_call_id + '"}' }}
    {{- '[/TOOL_RESULTS]' }}
  {%- else %}{{ raise_exception('only user and assistant') }}{% endif %}
{%- endfor %}
"""
GEMMA = """\
{{- bos_token }}
{%- set first = messages[0].content + '\\n\\n' if messages[0].role == 'system' else '' %}
{%- for message in (messages[1:] if first else messages) %}
  {%- if (message.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}
  {{- '<start_of_turn>' + ('model' if message.role == 'assistant' else message.role) + '\\n' }}
  {{- (first if loop.first else '') + (message.content | trim) + '<end_of_turn>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}
"""
PHI = """\
{%- for message in messages %}
  {{- '<|' + message.role + '|>' + message.content }}
  {%- if message.role == 'system' and message.tools %}{{ '<|tool|>' + message.tools + '<|/tool|>' }}{% endif %}
  {{- '<|end|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}
"""
PLAIN_CHATML = """\
{%- for message in messages %}
  {%- if loop.first and message.role != 'system' %}{{ '<|im_start|>system\\nBe helpful<|im_end|>\\n' }}{% endif %}
  {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}
"""


def family(name: str, folder: Path) -> Path:
    """A tokenizer with the template and the special tokens of a family in `CALLING`."""
    template, special, named = CALLING[name]
    return _save(_byte_level(special), folder, template, **named)


CALLING: Mapping[str, tuple[str, list[str], dict[str, str]]] = {
    "llama": (
        LLAMA_TOOLS,
        ["<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>", "<|python_tag|>", "<|eom_id|>"],
        {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"},
    ),
    "mistral": (
        MISTRAL,
        ["<s>", "</s>", "[TOOL_CALLS]"]
        + [f"[{end}{mark}]" for mark in ("INST", "AVAILABLE_TOOLS", "TOOL_RESULTS") for end in ("", "/")],
        {"bos_token": "<s>", "eos_token": "</s>"},
    ),
    "gemma": (
        GEMMA,
        ["<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"],
        {"bos_token": "<bos>", "eos_token": "<eos>"},
    ),
    "phi": (
        PHI,
        [f"<|{end}{mark}|>" for mark in ("tool", "tool_call") for end in ("", "/")]
        + [f"<|{mark}|>" for mark in ("system", "user", "assistant", "tool_response", "end", "endoftext")],
        {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"},
    ),
    "plain chatml": (PLAIN_CHATML, ["<|im_start|>", "<|im_end|>"], {"eos_token": "<|im_end|>"}),
}
"""Templates of families that call tools, or, the last three, know no tools."""


def _byte_level(special: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=[AddedToken(mark, special=True, normalized=False) for mark in special],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer


def _save(tokenizer: Tokenizer, folder: Path, template: str | None, **named: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **named}
    config |= {} if template is None else {"chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


HARD = [
    "東京特許許可局、123円です。한국어와 中文混排",
    "👩\u200d👩\u200d👧\u200d👦 🇩🇪 🤷🏽\u200d♀️ café e\u0301\u0323",
    "שלום עולם! مرحبا بالعالم \u202eRTL\u202c",
    "def f(x):\n\treturn {'a': [x**2 for _ in range(10)]}  # 0xFF != 1e-5\n\n\n    done",
    "\x00\x01\x07 bell\x1b[31m \x7f\u0085\u200b\ufeff\u2028 end",
    "<s> </s> <pad> <mask> <unk> [CLS] [SEP] [MASK] [PAD] [UNK] <extra_id_0>",
    "no<mask>gap [MASK]x <s>x</s>",
    "  two  spaces, trailing \t \n",
    "ﬁ ½ Ⅻ ﷺ ＡＢＣ ß İ ẞ Σς naïve",
    "",
    " ",
    "a" * 150,
]
"""Texts that tokenizers get wrong."""


def roberta(folder: Path, **config: object) -> Path:
    """As RoBERTa: byte-level, the first tokens special and the last."""
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    tokenizer = _bytes(special, TEXTS + HARD[:4])
    tokenizer.add_special_tokens([AddedToken("<mask>", lstrip=True, special=True, normalized=False)])
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    return _described(tokenizer, folder, "roberta", config)


def xlm_roberta(folder: Path, model_type: str = "xlm-roberta", **config: object) -> Path:
    """As XLM-R: Unigram, words behind a low line."""
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    tokenizer = _unigram(special)
    tokenizer.add_special_tokens([AddedToken("<mask>", lstrip=True, special=True, normalized=False)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    return _described(tokenizer, folder, model_type, config)


def mt5(folder: Path, **config: object) -> Path:
    """As mT5 and T5: Unigram, sentinels at the end."""
    tokenizer = _unigram(["<pad>", "</s>", "<unk>"])
    tokenizer.add_special_tokens([f"<extra_id_{number}>" for number in range(99, -1, -1)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    return _described(tokenizer, folder, "mt5", config)


def distilbert(folder: Path, **config: object) -> Path:
    """As DistilBERT: WordPiece without regard to case."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(TEXTS + HARD[:5], trainer)
    tokenizer.post_processor = _between("[CLS]", "[SEP]", tokenizer)
    return _described(tokenizer, folder, "distilbert", config)


def modernbert(folder: Path, **config: object) -> Path:
    """As ModernBERT: byte-level, runs of spaces added, what is special in the middle of what is not."""
    tokenizer = _bytes([], TEXTS + HARD[:4])
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.add_tokens([AddedToken(mark, special=False) for mark in ("|||IP_ADDRESS|||", "    ", "  ")])
    tokenizer.add_special_tokens(["[UNK]", "[CLS]", "[SEP]", "[PAD]"])
    tokenizer.add_special_tokens([AddedToken("[MASK]", lstrip=True, special=True, normalized=False)])
    tokenizer.add_tokens([AddedToken("[unused0]", special=False)])
    tokenizer.post_processor = _between("[CLS]", "[SEP]", tokenizer)
    roles = {"cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]", "mask_token": "[MASK]"}
    return _described(
        tokenizer, folder, "modernbert", {"tokenizer_class": "PreTrainedTokenizerFast", **roles, **config}
    )


ENCODERS = {
    "roberta": roberta,
    "xlm-roberta": xlm_roberta,
    "distilbert": distilbert,
    "modernbert": modernbert,
}


def _bytes(special: list[str], texts: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _unigram(special: list[str]) -> Tokenizer:
    """Split and normalized as what converted it has it, which the class of `transformers` does not heed."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence([normalizers.Replace(Regex(" {2,}"), " ")])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=200, special_tokens=special, unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator(TEXTS + HARD[:4], trainer)
    return tokenizer


def _between(first: str, last: str, tokenizer: Tokenizer) -> processors.TemplateProcessing:
    ids = [(token, tokenizer.token_to_id(token)) for token in (first, last)]
    return processors.TemplateProcessing(
        single=f"{first} $A {last}", pair=f"{first} $A {last} $B:1 {last}:1", special_tokens=ids
    )


def _described(tokenizer: Tokenizer, folder: Path, model_type: str, config: Mapping[str, object]) -> Path:
    """With a tokenizer_config.json where anything is to be said in one, and a config.json where none is there."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    if config:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    if not (folder / "config.json").is_file():
        (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    return folder
