"""What of a run goes to the Hub: path in the repository -> content, with nothing in it about the machine."""

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from mmap import ACCESS_READ, mmap
from pathlib import Path

import yaml

from blueberry.errors import UsageError

from .card import eval_results_file
from .events import scrubbed_events
from .remote_code import MODEL_TYPE, code_files, with_auto_map
from .run import AUDIT, BENCHMARKS, CONFIG, PROVENANCE, RESULTS, Run, config_name
from .scrub import Scrubber
from .sharding import sharded

Content = bytes | Path  # small and perhaps rewritten, or large and as it lies on the disk
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja",
              "additional_chat_templates/*.jinja")  # fmt: skip
_TEXTS = ("generation_config.json", RESULTS, PROVENANCE, BENCHMARKS, AUDIT, "optimizer_audit.md", *_TOKENIZER)
_MODEL_FILES = ("*.safetensors", "*.safetensors.index.json", "*config.json", "*_blueberry.py", *_TOKENIZER)


@dataclass
class Bundle:
    """Files to upload. `scratch` holds those that had to be written; it goes with the bundle."""

    files: dict[str, Content] = field(default_factory=dict)
    scratch: tempfile.TemporaryDirectory = field(default_factory=tempfile.TemporaryDirectory, repr=False)

    @property
    def figures(self) -> list[str]:
        return [path.removeprefix("figures/") for path in self.files if path.startswith("figures/")]

    def sizes(self) -> dict[str, int]:
        """Path -> bytes."""
        return {path: _size(content) for path, content in sorted(self.files.items())}


def bundle_of(run: Run, scrub: Scrubber, max_shard_size: str = "5GB") -> Bundle:
    """Everything but the card."""
    bundle = Bundle()
    scratch = Path(bundle.scratch.name)
    bundle.files |= model_files(run.folder, scrub) | sharded(run.folder, scratch, max_shard_size)
    bundle.files |= {
        CONFIG: yaml.safe_dump(scrub.value(run.settings), sort_keys=False).encode(),
        ".eval_results/blueberry.yaml": eval_results_file(run),
    }
    bundle.files |= {f"runs/{name}": content for name, content in scrubbed_events(run.folder / "runs", scrub).items()}
    if run.spectral_log is not None:
        bundle.files |= {f"spectral_log/{path.name}": path for path in run.spectral_log.parts()}
        bundle.files |= {f"figures/{path.name}": path for path in draw_figures(run, scratch / "figures")}
    check_clean(bundle.files, scrub)
    return bundle


def is_of_a_run(path: str) -> bool:
    """Whether a file of the repository was pushed with a finished run, and not with a checkpoint."""
    return "checkpoint" not in path.split("/")[0]


def is_of_a_model(path: str) -> bool:
    """Whether a file of the repository belongs to the model itself."""
    return "/" not in path and any(fnmatch(path, pattern) for pattern in _MODEL_FILES)


def model_files(folder: Path, scrub: Scrubber) -> dict[str, Content]:
    """Config, tokenizer and the other small files of a saved model, with the code that it needs; no weights."""
    name = config_name(folder)
    files: dict[str, Content] = {name: scrubbed(folder / name, scrub)}
    if json.loads(files[name]).get("model_type") == MODEL_TYPE:
        files |= {name: with_auto_map(files[name])} | code_files()
    for pattern in _TEXTS:
        for path in sorted(folder.glob(pattern)):
            name = str(path.relative_to(folder))
            files[name] = path.read_bytes() if name in ("tokenizer.json", RESULTS) else scrubbed(path, scrub)
    return files


def scrubbed(path: Path, scrub: Scrubber) -> bytes:
    """A text, or JSON string by string. UsageError if it is none."""
    try:
        text = path.read_text("utf-8")
        if path.suffix != ".json":
            return scrub.text(text).encode()
        return (json.dumps(scrub.value(json.loads(text)), indent=2, ensure_ascii=False) + "\n").encode()
    except ValueError as error:
        raise UsageError(f"{path} is damaged ({error}): write it again, or take it out of the folder") from error


def draw_figures(run: Run, folder: Path) -> list[Path]:
    """The figures of the spectral log, as PNG."""
    from blueberry.spectral.plots import combined, draw

    return draw(combined({run.folder.resolve().name: [run.spectral_log.read()]}), folder, ["png"])


def check_clean(files: Mapping[str, Content], scrub: Scrubber) -> None:
    """Raises UsageError if a file still tells something about the machine. Of weights the header is looked at."""
    for path, content in files.items():
        if found := scrub.leak(path.encode()) or scrub.leak(_looked_at(content)):
            raise UsageError(f"{path} holds {found}: nothing was uploaded; take it out of the file in the run folder")


def _looked_at(content: Content) -> bytes | mmap:
    if isinstance(content, bytes):
        return content
    with open(content, "rb") as file:
        if content.suffix == ".safetensors":
            return file.read(8 + min(int.from_bytes(file.read(8), "little"), 2**27))
        return mmap(file.fileno(), 0, access=ACCESS_READ) if content.stat().st_size else b""


def _size(content: Content) -> int:
    return len(content) if isinstance(content, bytes) else content.stat().st_size


def table(sizes: Mapping[str, int]) -> Sequence[str]:
    """One line for each file, and their sum."""
    lines = [f"{size:>13,}  {path}" for path, size in sizes.items()]
    return [*lines, f"{sum(sizes.values()):>13,}  bytes in {len(sizes)} files"]
