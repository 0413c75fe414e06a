"""Who may import whom, and that an import does nothing: every file of the package is parsed, and imported once."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import fedbench

PACKAGE = Path(fedbench.__file__).parent

#: High to low; a file imports from its own folder and from lower ones.
LAYERS = (
    "__main__", "verify", "bench", "report", "batch", "run", "results", "algorithms", "comm", "sim", "zo", "codec",
    "models", "data", "base",
)  # fmt: skip

#: Layers that see less than all that is below them.
NARROW = {
    "results": {"results", "base"},
    "algorithms": {"algorithms", "zo", "models", "data", "base"},
    "codec": {"codec", "base"},
    "sim": {"sim", "base"},
    "data": {"data", "base"},
}

#: Package -> files (or folders, with a slash) that alone may import it.
CONFINED = {
    "mpi4py": ("comm/mpi.py", "run/launch.py"),
    "h5py": ("results/",),
    "yaml": (),
    "dill": (),
    "cloudpickle": (),
    "joblib": (),
    "shelve": (),
    "marshal": (),
    "random": (),
    "secrets": (),
}

#: What may be taken from `pickle`: the errors of other people's pickles.
PICKLE_ALLOWED = {"PickleError", "PicklingError", "UnpicklingError"}

#: What may be taken from `numpy.random`: generators that are made from a key.
NUMPY_RANDOM_ALLOWED = {"Generator", "Philox", "BitGenerator", "SeedSequence"}

#: What torch does with its global generator, or reads as pickles.
TORCH_FORBIDDEN = {
    "load", "save", "seed", "manual_seed", "initial_seed", "set_rng_state", "rand", "rand_like", "randn", "randn_like",
    "randint", "randint_like", "randperm", "bernoulli", "multinomial", "normal", "poisson",
}  # fmt: skip

#: One sanctioned use each: (file, dotted name).
EXCEPTIONS: set[tuple[str, str]] = {
    ("bench/zo_step.py", "torch.randn"),  # the reference, MeZO in place, from a generator of its own
}


def dotted(node: ast.AST) -> str:
    """Return `a.b.c` of a chain of attributes, or an empty string."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        before = dotted(node.value)
        return f"{before}.{node.attr}" if before else ""
    return ""


class File:
    """One parsed source file: `imports` are absolute dotted names with their lines, `used` dotted names in full."""

    def __init__(self, path: str, source: str) -> None:
        self.path = path
        self.imports: list[tuple[int, str]] = []
        self.used: list[tuple[int, str]] = []
        aliases: dict[str, str] = {}
        tree = ast.parse(source, path)
        folder = ["fedbench", *Path(path).parts[:-1]]
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                for name in node.names:
                    self.imports.append((node.lineno, name.name))
                    aliases[name.asname or name.name.partition(".")[0]] = (
                        name.name if name.asname else name.name.partition(".")[0]
                    )
            elif isinstance(node, ast.ImportFrom):
                base = ".".join([*folder[: len(folder) - node.level + 1], node.module or ""]) if node.level else ""
                module = (base or node.module or "").strip(".")
                for name in node.names:
                    self.imports.append((node.lineno, f"{module}.{name.name}"))
                    aliases[name.asname or name.name] = f"{module}.{name.name}"
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute | ast.Name) and (name_ := dotted(node)):
                first, _, rest = name_.partition(".")
                if first in aliases:
                    self.used.append((node.lineno, aliases[first] + (f".{rest}" if rest else "")))
            if isinstance(node, ast.Call) and dotted(node.func) in ("__import__", "importlib.import_module"):
                for argument in node.args[:1]:
                    if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
                        self.imports.append((node.lineno, f"{argument.value}."))

    @property
    def layer(self) -> str:
        """Its folder; `__init__.py` of the package itself counts as the lowest layer."""
        first = Path(self.path).parts[0].removesuffix(".py")
        return "base" if first == "__init__" else first


def violations(path: str, source: str) -> list[str]:
    """Return everything in a file (path relative to the package) that the layers or the confinements forbid."""
    file = File(path, source)
    if file.layer not in LAYERS:
        return [f"{path}: {file.layer} is no layer"]
    found: dict[str, None] = {}
    allowed = NARROW.get(file.layer, set(LAYERS[LAYERS.index(file.layer) :]))
    for line, name in file.imports:
        package, *rest = name.split(".")
        if package == "fedbench" and rest and rest[0] not in allowed:
            found[f"{path}:{line}: {file.layer} imports {name}"] = None
        homes = CONFINED.get(package)
        if homes is not None and not any(path == h or (h.endswith("/") and path.startswith(h)) for h in homes):
            found[f"{path}:{line}: {package} outside {', '.join(homes) or 'the tests'}"] = None
    for line, name in [*file.used, *file.imports]:
        package, _, rest = name.partition(".")
        taken = rest.split(".")[0]
        bad = (
            (package == "pickle" and taken and taken not in PICKLE_ALLOWED)
            or (package == "torch" and taken in TORCH_FORBIDDEN)
            or name.startswith(("torch.cuda.manual_seed", "torch.random.manual_seed", "torch.random.seed"))
            or (
                name.startswith("numpy.random.")
                and name.removeprefix("numpy.random.").split(".")[0] not in NUMPY_RANDOM_ALLOWED
            )
            or name.endswith(".allow_pickle")
        )
        if bad and (path, name) not in EXCEPTIONS:
            found[f"{path}:{line}: uses {name}"] = None
    return list(found)


def sources() -> Iterator[tuple[str, str]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        yield path.relative_to(PACKAGE).as_posix(), path.read_text(encoding="utf-8")


def test_no_file_breaks_the_layers_or_a_confinement() -> None:
    files = list(sources())
    assert len(files) > 60
    assert {File(path, text).layer for path, text in files} <= set(LAYERS)
    assert [fault for path, text in files for fault in violations(path, text)] == []


#: (file, source, what is said of it)
PLANTED = [
    ("base/x.py", "from fedbench.models import load", "base imports fedbench.models.load"),
    ("base/x.py", "import fedbench.run.build", "base imports fedbench.run.build"),
    ("base/x.py", "def f():\n    from fedbench.zo.stream import Stream", "x.py:2: base imports fedbench.zo.stream"),
    ("zo/x.py", "from fedbench import comm", "zo imports fedbench.comm"),
    ("zo/kernels/x.py", "from ...run import build", "zo imports fedbench.run.build"),
    ("zo/x.py", "from ..comm.star import Star", "zo imports fedbench.comm.star.Star"),
    ("results/x.py", "from fedbench.algorithms.base import Round", "results imports fedbench.algorithms"),
    ("results/x.py", "from fedbench.codec import frame", "results imports fedbench.codec"),
    ("algorithms/x.py", "from fedbench.comm.star import Star", "algorithms imports fedbench.comm"),
    ("algorithms/x.py", "from fedbench.codec.frame import pack", "algorithms imports fedbench.codec"),
    ("codec/x.py", "from fedbench.models.load import build", "codec imports fedbench.models"),
    ("comm/x.py", "import importlib\nimportlib.import_module('fedbench.run.runner')", "comm imports fedbench.run"),
    ("run/x.py", "if True:\n    import fedbench.report.table as t", "run imports fedbench.report.table"),
    ("helpers/x.py", "", "helpers is no layer"),
    ("comm/star.py", "from mpi4py import MPI", "mpi4py outside comm/mpi.py, run/launch.py"),
    ("comm/star.py", "def f():\n    import mpi4py.MPI", "mpi4py outside"),
    ("comm/star.py", "MPI = __import__('mpi4py')", "mpi4py outside"),
    ("run/ckpt.py", "import h5py", "h5py outside results/"),
    ("data/x.py", "import pickle\npickle.loads(b'')", "uses pickle.loads"),
    ("data/x.py", "from pickle import dumps as d", "uses pickle.dumps"),
    ("data/x.py", "import yaml", "yaml outside the tests"),
    ("models/x.py", "import torch\ntorch.load('x')", "uses torch.load"),
    ("models/x.py", "from torch import load", "uses torch.load"),
    ("models/x.py", "import torch as t\nt.manual_seed(0)", "uses torch.manual_seed"),
    ("models/x.py", "import torch\nz = torch.randn(3)", "uses torch.randn"),
    ("models/x.py", "import torch\ntorch.cuda.manual_seed_all(3)", "uses torch.cuda.manual_seed_all"),
    ("zo/x.py", "import numpy as np\nnp.random.seed(0)", "uses numpy.random.seed"),
    ("zo/x.py", "from numpy.random import default_rng", "uses numpy.random.default_rng"),
    ("zo/x.py", "from numpy import random\nrandom.standard_normal(3)", "uses numpy.random.standard_normal"),
    ("zo/x.py", "import random", "random outside the tests"),
]


@pytest.mark.parametrize(("path", "source", "said"), PLANTED)
def test_a_planted_violation_is_found(path: str, source: str, said: str) -> None:
    assert said in "\n".join(violations(path, source))


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("__main__.py", "from fedbench.verify import x\nfrom fedbench.run import y"),
        ("run/x.py", "from fedbench.results import writer\nfrom fedbench.base import rng"),
        ("zo/x.py", "from .direction import Terms\nfrom fedbench.models.cut import Cut"),
        ("comm/mpi.py", "from mpi4py import MPI"),
        ("results/deep/x.py", "import h5py"),
        ("zo/x.py", "import pickle\ntry:\n    pass\nexcept pickle.PickleError:\n    raise"),
        ("base/rng.py", "import numpy as np\nnp.random.Generator(np.random.Philox(key=1))"),
        ("models/x.py", "import torch\nload = dict\nload()\ntorch.zeros(3)"),
    ],
)
def test_what_is_allowed_is_not_complained_of(path: str, source: str) -> None:
    assert violations(path, source) == []


def cycles(imports: dict[str, set[str]]) -> list[list[str]]:
    """Return one cycle for each module that a walk along imports finds on its own path."""
    found: list[list[str]] = []
    done: set[str] = set()

    def walk(name: str, trail: list[str]) -> None:
        if name in trail:
            found.append([*trail[trail.index(name) :], name])
        elif name not in done:
            for other in sorted(imports.get(name, ())):
                walk(other, [*trail, name])
            done.add(name)

    for name in sorted(imports):
        walk(name, [])
    return found


def module_imports(files: list[tuple[str, str]]) -> dict[str, set[str]]:
    """Return module -> modules of the package that it imports anywhere, `from package import module` included."""
    names = {
        path: ".".join(["fedbench", *Path(path).with_suffix("").parts]).removesuffix(".__init__") for path, _ in files
    }
    modules = set(names.values())
    graph: dict[str, set[str]] = {name: set() for name in modules}
    for path, text in files:
        for _, name in File(path, text).imports:
            target = name.strip(".") if name.strip(".") in modules else name.rpartition(".")[0]
            if target in modules and target != names[path]:
                graph[names[path]].add(target)
    return graph


def test_no_module_imports_itself_over_others() -> None:
    assert cycles(module_imports(list(sources()))) == []


def test_a_planted_cycle_is_found() -> None:
    files = [
        ("zo/a.py", "from fedbench.zo import b"),
        ("zo/b.py", "def f():\n    from .c import x"),
        ("zo/c.py", "import fedbench.zo.a"),
        ("zo/d.py", "from fedbench.zo.a import y"),
        ("zo/__init__.py", ""),
    ]
    assert cycles(module_imports(files)) == [["fedbench.zo.a", "fedbench.zo.b", "fedbench.zo.c", "fedbench.zo.a"]]


#: Imports every module of some packages in a fresh process and prints what each did to the process.
PROBE = """
import importlib, json, os, pathlib, pkgutil, random, signal, sys, threading
import numpy, torch
import h5py, lz4.frame, matplotlib, mpi4py, numba, pydantic, rich.console, rich.progress, safetensors, xxhash
sys.path.insert(0, sys.argv[1])
def state():
    return {
        "torch's generator": torch.get_rng_state().sum().item() + torch.initial_seed(),
        "numpy's generator": int(numpy.random.get_state()[1].sum()) + numpy.random.get_state()[2],
        "random's generator": hash(random.getstate()),
        "torch's threads": torch.get_num_threads(),
        "torch's default type": str(torch.get_default_dtype()),
        "gradients": torch.is_grad_enabled(),
        "running threads": threading.active_count(),
        "signal handlers": str([signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, 2)]),
        "the environment": str(sorted((k, v) for k, v in os.environ.items() if not k.startswith("KMP_"))),
        "the working folder": os.getcwd() + str(sorted(map(str, pathlib.Path.cwd().rglob("*")))),
        "the home folder": str(sorted(map(str, pathlib.Path.home().rglob("*")))),
        "exception hooks": str([sys.excepthook, threading.excepthook]),
        "CUDA": torch.cuda.is_initialized(),
        "heavy modules": [m for m in ("mpi4py.MPI", "transformers", "datasets", "tokenizers") if m in sys.modules],
    }
found = {}
for name in sys.argv[2:]:
    before = state()
    package = importlib.import_module(name)
    modules = [m.name for m in pkgutil.walk_packages(package.__path__, name + ".")]
    for module in modules:
        importlib.import_module(module)
    after = state()
    found[name] = [len(modules), [what for what in before if before[what] != after[what]]]
print(json.dumps(found))
"""

PLANTED_MODULE = """
import os, pathlib, threading
import numpy, torch
torch.manual_seed(3)
torch.set_num_threads(1 + torch.get_num_threads())
numpy.random.rand()
pathlib.Path("made").mkdir()
(pathlib.Path.home() / ".planted").mkdir()
os.environ["PLANTED"] = "1"
threading.Thread(target=threading.Event().wait, daemon=True).start()
from mpi4py import MPI
"""


def test_importing_everything_does_nothing_and_a_module_that_does_is_found(tmp_path: Path) -> None:
    planted = tmp_path / "root" / "planted"
    for folder in (planted, tmp_path / "home", tmp_path / "cwd"):
        folder.mkdir(parents=True)
    (planted / "__init__.py").write_text("")
    (planted / "module.py").write_text(PLANTED_MODULE)
    environment = {"HOME": str(tmp_path / "home"), "PATH": os.environ["PATH"], "MPLCONFIGDIR": str(tmp_path)}
    ran = subprocess.run(
        [sys.executable, "-c", PROBE, str(tmp_path / "root"), "fedbench", "planted"],
        cwd=tmp_path / "cwd",
        env=environment | {"PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.count("\n") == 1, "an import printed something"
    found = json.loads(ran.stdout)
    assert found["fedbench"] == [len(list(sources())) - 1, []]
    assert found["planted"] == [
        1,
        [
            "torch's generator",
            "numpy's generator",
            "torch's threads",
            "running threads",
            "the environment",
            "the working folder",
            "the home folder",
            "heavy modules",
        ],
    ]
