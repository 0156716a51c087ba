"""A version whose weights are not those that were registered is refused, in the registry and in a Bento."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from components.config.params import InputError
from components.tracking.registry import WEIGHTS_SHA256, ModelVersion, Registry
from serving.models.versions import Bundled

Register = Callable[..., ModelVersion]


def test_weights_that_were_replaced_are_refused(registry: Registry, registered: Register) -> None:
    version = registered(0.5)
    assert len(version.tags[WEIGHTS_SHA256]) == 64
    folder = version.folder
    (folder / "model.safetensors").write_bytes(b"others")
    refused = r"agent/1: .*: its weights have the SHA-256 \w{12}…, and were registered with \w{12}…; restore them"
    with pytest.raises(InputError, match=refused):
        _ = registry.resolve("agent/1").folder
    with pytest.raises(InputError, match=r"agent/1: .*registered with"):
        registry.promote(registry.resolve("agent/1"))
    with pytest.raises(InputError, match=r"agent/1: .*registered with"):
        Bundled(folder, {"name": "agent", "version": 1, "tags": version.tags})
    (folder / "model.safetensors").write_bytes(b"")
    assert registry.resolve("agent/1").folder == folder
    Bundled(folder, {"name": "agent", "version": 1, "tags": version.tags})
