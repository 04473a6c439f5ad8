"""The Hugging Face hub, asked once whether it can be reached before its libraries are imported.

Left to themselves they try every file six times, with a line for each try, before they look into their cache.
"""

import os
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

TIMEOUT_S = 5.0
OFFLINE_VARIABLES = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")


def endpoint() -> str:
    return os.environ.get("HF_ENDPOINT", "https://huggingface.co")


def looks_like_a_path(name: str) -> bool:
    """Whether `name` cannot be a hub name, which is `model` or `owner/model`."""
    return name.startswith((".", "/", "~")) or name.endswith("/") or name.count("/") > 1


def is_offline() -> bool:
    """Whether the user, or `cache_without_hub`, has told the hub's libraries to use their cache alone."""
    return any(os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE") for name in OFFLINE_VARIABLES)


@cache
def why_unreachable() -> str | None:
    """Why the hub does not answer, in a word or two; None if it does. Proxies and certificates are those of `requests`."""
    import requests

    try:
        response = requests.head(endpoint(), timeout=TIMEOUT_S, allow_redirects=False)
    except requests.RequestException as error:
        return type(error).__name__
    return f"it answers {response.status_code}" if response.status_code >= 500 else None


def cache_without_hub(models: Sequence[str], *, dataset: str | None, say: Callable[[str], None]) -> None:
    """Where something must come from the hub, and it cannot be reached: use its cache from here on, in a started server too.

    Call it before transformers or datasets is imported, which read HF_HUB_OFFLINE only then. `models` are names, or folders,
    which need no hub; `dataset` is None where the data are files.

    Raises:
        ValueError: a model is not in the cache; one line.
    """
    models = [model for model in models if not (looks_like_a_path(model) or Path(model).expanduser().exists())]
    wanted = [*models, *([dataset] if dataset else [])]
    told = is_offline()
    reason = why_unreachable() if wanted and not told else None
    if not wanted or not (told or reason):
        return
    os.environ["HF_HUB_OFFLINE"] = "1"
    from huggingface_hub import try_to_load_from_cache

    gone = "HF_HUB_OFFLINE is set" if told else f"the hub at {endpoint()} cannot be reached ({reason})"
    for model in models:
        files = ("config.json", "adapter_config.json")  # an adapter is there too, and is refused in words of its own
        if not any(isinstance(try_to_load_from_cache(model, file), str) for file in files):
            raise ValueError(
                f"{gone}, and {model} is not in the hub's cache on this machine: name a folder, or fetch it where the hub "
                "can be reached; HF_HUB_OFFLINE=1 uses what is in the cache without asking"
            )
    if reason:
        say(
            f"{gone}: taking {' and '.join(wanted)} from its cache on this machine; HF_HUB_OFFLINE=1 does not ask at all"
        )
