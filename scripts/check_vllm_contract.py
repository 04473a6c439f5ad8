"""Does ludic fit these versions of vLLM, by their source files? Nothing of vLLM is installed or run.

    uv run --with remotezip --with pip python scripts/check_vllm_contract.py 0.26.0 0.33.0

Of each version's wheel, which has some 400 MB, it fetches the few files that `tests/vllm_contract.py` leads to, by HTTP range
requests. pip finds the wheel, in the index that it is configured for. Exits with 1 if something is missing.
"""

import json
import subprocess
import sys
from pathlib import Path

from remotezip import RemoteZip

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.vllm_sources import Sources, problems

REPORT = ("install", "--dry-run", "--ignore-installed", "--no-deps", "--quiet", "--report", "-")


def wheel_url(version: str) -> str:
    """Where pip would download vLLM's wheel from."""
    command = (sys.executable, "-m", "pip", *REPORT, f"vllm=={version}")
    report = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    return str(json.loads(report)["install"][0]["download_info"]["url"])


def check(version: str) -> bool:
    """Print what the version lacks of the list; whether it has all."""
    with RemoteZip(wheel_url(version)) as wheel:
        names, fetched = set(wheel.namelist()), []

        def read(path: str) -> str | None:
            if path not in names:
                return None
            fetched.append(path)
            return wheel.read(path).decode()

        found = problems(Sources(read))
    print(f"vLLM {version}: {'; '.join(found) or 'fits'} ({len(fetched)} of {len(names)} files read)")
    return not found


if __name__ == "__main__":
    if not sys.argv[1:]:
        sys.exit("usage: check_vllm_contract.py VERSION [VERSION...]")
    sys.exit(not all([check(version) for version in sys.argv[1:]]))
