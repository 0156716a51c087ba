"""Small tokenizers of other model families, with templates of their formats."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

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


def sentencepiece(folder: Path) -> Path:
    """As Llama 2: words behind a low line, bytes as `<0x0A>`, no prompt for the model's turn."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = [AddedToken(mark, special=True, normalized=False) for mark in ("<unk>", "<s>", "</s>")]
    words = [AddedToken(f"<0x{byte:02X}>", special=False, normalized=False) for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=[*special, *words], show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    described = json.loads(tokenizer.to_str())
    described["added_tokens"] = [token for token in described["added_tokens"] if token["special"]][:3]
    tokenizer = Tokenizer.from_str(json.dumps(described))
    return _save(tokenizer, folder, INSTRUCT, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


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


def _save(tokenizer: Tokenizer, folder: Path, template: str | None, **named: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **named}
    config |= {} if template is None else {"chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder
