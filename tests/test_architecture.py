"""Dependencies point one way, imports stay lazy, and the package that users install is complete."""

import ast
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT

PACKAGES = ("blueberry", "trainer_callbacks", "hub")
# module prefix -> prefixes of this project it may import; the longest matching prefix decides
ALLOWED = {
    "blueberry.configuration_blueberry": (),
    "blueberry.attention_blueberry": (
        "blueberry.first_order_blueberry",
        "blueberry.products_blueberry",
        "blueberry.threads_blueberry",
    ),
    "blueberry.first_order_blueberry": (),
    "blueberry.experts_blueberry": (
        "blueberry.first_order_blueberry",
        "blueberry.memory_blueberry",
        "blueberry.products_blueberry",
        "blueberry.threads_blueberry",
    ),
    "blueberry.inputs_blueberry": (),
    "blueberry.linear_blueberry": (
        "blueberry.first_order_blueberry",
        "blueberry.memory_blueberry",
        "blueberry.products_blueberry",
    ),
    "blueberry.losses_blueberry": (
        "blueberry.first_order_blueberry",
        "blueberry.memory_blueberry",
        "blueberry.products_blueberry",
    ),
    "blueberry.memory_blueberry": (),
    "blueberry.norm_blueberry": ("blueberry.first_order_blueberry", "blueberry.products_blueberry"),
    "blueberry.products_blueberry": (),
    "blueberry.rotary_blueberry": ("blueberry.configuration_blueberry",),
    "blueberry.upcycling_blueberry": ("blueberry.configuration_blueberry",),
    "blueberry.modeling_blueberry": (
        "blueberry.attention_blueberry",
        "blueberry.configuration_blueberry",
        "blueberry.experts_blueberry",
        "blueberry.inputs_blueberry",
        "blueberry.linear_blueberry",
        "blueberry.losses_blueberry",
        "blueberry.norm_blueberry",
        "blueberry.products_blueberry",
        "blueberry.rotary_blueberry",
        "blueberry.upcycling_blueberry",
    ),
    "blueberry.errors": (),
    "blueberry.threads_blueberry": ("blueberry.products_blueberry",),
    "blueberry.scratch": (),
    "blueberry.symmetric_products": ("blueberry.scratch",),
    "blueberry.matrix_polynomials": ("blueberry.scratch", "blueberry.symmetric_products"),
    "blueberry.polar": (
        "blueberry.errors",
        "blueberry.matrix_polynomials",
        "blueberry.scratch",
        "blueberry.symmetric_products",
    ),
    "blueberry.manifolds": ("blueberry.errors", "blueberry.polar"),
    "blueberry.stiefel": ("blueberry.errors",),
    "blueberry.spectral": ("blueberry.errors", "blueberry.threads_blueberry", "blueberry.spectral"),
    "blueberry.spectral.tracked": ("blueberry.errors", "blueberry.optim", "blueberry.spectral"),
    "blueberry.optim": (
        "blueberry.errors",
        "blueberry.polar",
        "blueberry.manifolds",
        "blueberry.scratch",
        "blueberry.stiefel",
        "blueberry.threads_blueberry",
        "blueberry.optim",
    ),
    "blueberry": ("blueberry",),
    "trainer_callbacks": ("blueberry", "trainer_callbacks"),
    "hub": ("blueberry", "hub"),
    "scripts": (*PACKAGES, "scripts"),
}


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports_of(path: Path) -> set[str]:
    """Absolute names of the modules that a file imports at run time, wherever in the file."""
    package = module_name(path) if path.name == "__init__.py" else module_name(path).rpartition(".")[0]
    tree = ast.parse(path.read_text())
    typing_only = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    names = set()
    for node in ast.walk(tree):
        if node in typing_only:
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            names |= {base} if node.module else {f"{base}.{alias.name}" for alias in node.names}
    return names


def within(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(prefix + ".")


def sources() -> list[Path]:
    return [path for folder in (*PACKAGES, "scripts") for path in sorted((ROOT / folder).rglob("*.py"))]


@pytest.mark.parametrize("path", sources(), ids=module_name)
def test_dependencies_point_one_way(path):
    name = module_name(path)
    prefix = max((p for p in ALLOWED if within(name, p)), key=len)
    ours = {n for n in imports_of(path) if n.split(".")[0] in (*PACKAGES, "scripts", "tests")}
    wrong = {n for n in ours if not any(within(n, allowed) for allowed in ALLOWED[prefix]) and not within(n, name)}
    assert not wrong, f"{name} must not import {sorted(wrong)}"


def test_the_import_checker_sees_every_way_to_import(tmp_path):
    """The oracle of the test above: a file that breaks the rule in each way is caught."""
    path = ROOT / "blueberry" / "spectral" / "__imaginary__.py"
    code = (
        "import trainer_callbacks\nfrom ..optim import Muon\nfrom .. import training\ndef f():\n    import hub.card\n"
    )
    try:
        path.write_text(code)
        assert imports_of(path) == {"trainer_callbacks", "blueberry.optim", "blueberry.training", "hub.card"}
    finally:
        path.unlink()


def test_importing_blueberry_loads_neither_torch_nor_transformers():
    code = "import sys, blueberry; sys.exit(bool({'torch', 'transformers', 'matplotlib'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.mark.parametrize(
    "first",
    [
        "import blueberry",
        "import transformers",
        "from blueberry import BlueberryForCausalLM",
        "import blueberry; from transformers import LlamaForCausalLM",  # layers before Auto classes
        "import blueberry; from transformers import Trainer",
    ],
)
def test_auto_classes_know_blueberry_whatever_is_imported_first(first):
    code = f"""{first}
import blueberry
from transformers import AutoConfig, AutoModelForCausalLM
config = AutoConfig.for_model("blueberry", hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                              num_key_value_heads=1, vocab_size=20)
assert type(AutoModelForCausalLM.from_config(config)).__module__ == "blueberry.modeling_blueberry"
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-1500:]


def test_the_wheel_built_from_the_sdist_holds_the_three_packages_and_their_data(tmp_path):
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-1500:]
    (wheel,) = tmp_path.glob("blueberry_muon-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    installed = {str(p.relative_to(tmp_path / "site")) for p in (tmp_path / "site").rglob("*") if p.is_file()}
    ours = {str(p.relative_to(ROOT)) for folder in PACKAGES for p in (ROOT / folder).rglob("*")
            if p.is_file() and "__pycache__" not in p.parts}  # fmt: skip
    assert ours <= installed
    code = "import blueberry.training.evaluation as e, trainer_callbacks, hub; e.load_metrics(); print(e.__file__)"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path / "site", capture_output=True, text=True)
    assert str(tmp_path) in done.stdout, done.stderr[-1500:]
