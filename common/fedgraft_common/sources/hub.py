"""`hf:ID` and `hf:ID@REVISION`: a repository of the Hugging Face hub, best from the local cache.

Only configuration, tokenizer and safetensors files are ever asked for. What is in the cache is
used without a word to the network; `HF_HUB_OFFLINE=1` forbids the rest.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fedgraft_common import plan as plans
from fedgraft_common.errors import BackboneError
from fedgraft_common.sources import directory as directories
from fedgraft_common.sources.source import Loaded

FILES = ("*.json", "*.safetensors", "*.txt", "*.model")
NOT_FILES = ("onnx/*", "openvino/*", "*/*")


def load(location: str, config: plans.Backbone) -> Loaded:
    """Finds or fetches the repository and loads it as a directory.

    Raises:
        BackboneError: it is not in the cache and cannot be fetched, or as `directory.load`.
    """
    return directories.load(str(snapshot(location, config)), config)


def snapshot(location: str, config: plans.Backbone) -> Path:
    """Where a repository lies in the local cache, fetched if need be."""
    name, _, revision = location.partition("@")
    wanted: dict[str, Any] = {
        "repo_id": name,
        "revision": revision or None,
        "allow_patterns": list(FILES),
        "ignore_patterns": list(NOT_FILES),
    }
    return Path(fetched("snapshot_download", f"hf:{location}", wanted))


def fetched(function: str, what: str, wanted: dict[str, Any]) -> str:
    """Calls a function of huggingface_hub, first for the cache alone.

    Raises:
        BackboneError: not in the cache, and the network or the hub says no.
    """
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    download = getattr(huggingface_hub, function)
    try:
        try:
            return str(download(**wanted, local_files_only=True))
        except (FileNotFoundError, HfHubHTTPError):
            return str(download(**wanted))
    except HFValidationError as error:
        raise BackboneError(
            "backbone.source", what, "OWNER/NAME of a repository, maybe with @REVISION",
            "Correct the plan.",
        ) from error  # fmt: skip
    except (OSError, HfHubHTTPError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise BackboneError(
            "backbone.source", what, "a repository in this machine's hub cache, or one that can "
            f"be fetched ({reason})",
            "Fetch it once where there is a network (hf download OWNER/NAME) and copy the cache, "
            "or name a directory with dir:PATH.",
        ) from None  # fmt: skip
