"""The package as a whole: what importing it loads, who imports whom, and its versions."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import adalora_kernels

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "adalora_kernels"
# Design, section 3: a module imports from those to its right only.
LAYERS = [
    {"__main__"},
    {"trainer", "lightning"},
    {"training", "export"},
    {"peft", "loralib", "plot"},
    {"modules", "allocator"},
    {"functional"},
    {"orthogonality"},
    {"short"},
    {"ops"},
    {"cpu", "importance", "launching", "distributed"},
    {"reference", "adapters", "checks", "starts", "fusing", "merging", "kernels", "_extension"},
]
ALLOCATOR = [
    {"allocator"},
    {"attach"},
    {"engine"},
    {"processes"},
    {"begin"},
    {"report"},
    {"state", "shrink", "reminder", "schedule"},
    {"members", "steps", "devices"},
    {"shards"},
]
DISTRIBUTED = [
    {"deepspeed", "replicas", "engines", "stages", "tensor_parallel", "local_layer"},
    {"layout"},
    {"shards", "groups"},
]
KERNELS = [{"tune", "encode"}, {"svd_linear"}, {"recipe"}, {"launch"}]
PEFT = [{"model", "report"}, {"allocator"}, {"config", "layers"}, {"saving"}]
EXPORT = [{"load", "save"}, {"adapter", "state"}, {"files"}]
SVD_LINEAR = [{"calls"}, {"forward", "backward"}, {"gemm"}, {"common"}, {"plans"}]


def test_imports_are_made_when_they_are_needed():
    code = (
        "import sys, adalora_kernels as a;"
        "own = ('triton', 'peft', 'transformers', 'lightning', 'pytorch_lightning', 'matplotlib',"
        " 'accelerate', 'deepspeed');"
        "print([m for m in own if m in sys.modules]);"
        "print(a.loralib.__name__, a.peft.apply.__name__, a.plot.rank_heatmap.__name__,"
        " a.trainer.AdaLoraCallback.__name__, a.lightning.AdaLoraCallback.__name__,"
        " a.export.export_lora.__name__)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert result.stdout.splitlines() == [
        "[]",
        "adalora_kernels.loralib apply rank_heatmap AdaLoraCallback AdaLoraCallback export_lora",
    ], result.stderr
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = adalora_kernels.nothing


def own_imports(path, folder):
    """What a module below a folder imports from the folder as it runs, not for types only."""
    level = len(path.relative_to(folder).parts)
    nodes = [ast.parse(path.read_text())]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        nodes += ast.iter_child_nodes(node)
        if isinstance(node, ast.ImportFrom) and node.level == level:
            yield from [node.module] if node.module else [a.name for a in node.names]


@pytest.mark.parametrize(
    ("folder", "layers"),
    [
        (PACKAGE, LAYERS),
        (PACKAGE / "allocator", ALLOCATOR),
        (PACKAGE / "distributed", DISTRIBUTED),
        (PACKAGE / "peft", PEFT),
        (PACKAGE / "export", EXPORT),
        (PACKAGE / "kernels", KERNELS),
        (PACKAGE / "kernels" / "svd_linear", SVD_LINEAR),
    ],
    ids=["", "allocator", "distributed", "peft", "export", "kernels", "svd_linear"],
)
def test_imports_go_one_way(folder, layers):
    level = {module: i for i, layer in enumerate(layers) for module in layer}
    files = [path for path in folder.rglob("*.py") if path != folder / "__init__.py"]
    module_of = {path: path.relative_to(folder).parts[0].removesuffix(".py") for path in files}
    assert set(module_of.values()) == set(level), "every module has its layer"
    for path, module in module_of.items():
        for imported in own_imports(path, folder):
            if imported != "__version__":
                outer = imported.split(".")[0]
                assert level[module] < level[outer], f"{path} imports {imported}"


def test_kernels_import_nothing_of_ours():
    folder = PACKAGE / "kernels"
    for path in folder.rglob("*.py"):
        depth = len(path.relative_to(folder).parts)
        for node in ast.walk(ast.parse(path.read_text())):
            assert not isinstance(node, ast.ImportFrom) or node.level <= depth, path
            assert not (isinstance(node, ast.ImportFrom) and "adalora" in (node.module or "")), path


def test_versions_agree():
    version = adalora_kernels.__version__
    project = (ROOT / "pyproject.toml").read_text()
    assert re.search(r'^version = "(.+)"$', project, re.MULTILINE)[1] == version
    latest = re.search(r"^## \[(.+)\] - (.+)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    citation = (ROOT / "CITATION.cff").read_text()
    assert latest[1] == version
    assert f"\nversion: {version}\ndate-released: {latest[2]}\n" in citation
    minor = version.rpartition(".")[0]
    assert f"**Status: version {minor}, " in (ROOT / "README.md").read_text()
    assert f"The latest minor version, {minor} at present." in (ROOT / "SECURITY.md").read_text()


def test_no_file_can_run_anything():
    """What SECURITY.md says of files. Between processes torch pickles, in one place."""
    running = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "subprocess", "runpy", "yaml"}
    running |= {"eval", "exec", "__import__", "os.system"}
    running |= {"torch.load", "torch.hub", "torch.jit.load"}
    pickling = []
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = {alias.name for alias in node.names} | {getattr(node, "module", None)}
            elif isinstance(node, ast.Name | ast.Attribute):
                names = {ast.unparse(node)}
            else:
                continue
            assert not names & running, f"{path}:{node.lineno}"
            pickling += [path.name for name in names if name and name.endswith("_object")]
    assert pickling == ["stages.py"]


def test_public_names_have_documentation():
    for name in adalora_kernels.__all__:
        if name != "__version__":
            assert getattr(adalora_kernels, name).__doc__, name


def test_every_constraint_is_a_pin():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert all(line.count("==") == 1 for line in pins)
    for package in ("torch==2.13.0", "triton==3.7.1", "peft==0.21.2", "ruff==", "mypy=="):
        assert any(pin.startswith(package) for pin in pins), package


def test_what_is_built_in_an_environment_of_its_own_has_the_torch_of_the_constraints():
    project = (ROOT / "pyproject.toml").read_text()
    pin = re.search(r'^requires = \[.*"(torch==.+?)"\]$', project, re.MULTILINE)[1]
    assert pin in (ROOT / "constraints.txt").read_text().splitlines()


def test_the_oldest_triton_is_among_those_that_kernels_are_compiled_under():
    constraints = (ROOT / "constraints.txt").read_text()
    (others,) = re.findall(r"^# Other tritons: (.+)$", constraints, re.MULTILINE)
    oldest = re.search(r'"triton>=([\d.]+)', (ROOT / "pyproject.toml").read_text())[1]
    assert others.split()[0].startswith(oldest)
    assert not any(f"triton=={version}\n" in constraints for version in others.split())
