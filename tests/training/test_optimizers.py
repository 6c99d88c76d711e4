"""Every built-in trains and resumes bit for bit; wrong names and arguments are refused before anything is called."""

import pytest
import torch
from torch import nn

from library.config.tables.optimizer import OPTIMIZERS
from library.errors import ConfigError
from library.training import optimizer_arguments, optimizers, state
from library.training.optimizer_arguments import BUILT_IN, parse_arguments
from library.training.optimizers import OptimizerSet, ParameterGroup, choose, try_out


def test_names_are_those_of_the_configuration():
    """The table that refuses unknown names and the one that knows the classes agree."""
    assert set(OPTIMIZERS) == set(BUILT_IN)


DOTTED = ("torch.optim.NAdam", "torch.optim.RMSprop", "torch.optim.Adamax")
SIZES = {"small": (8, 4), "large": (80, 64)}  # 8-bit states begin at 4096 values


def parameters(seed: int = 0) -> dict[str, nn.Parameter]:
    """Two weights to train."""
    generator = torch.Generator().manual_seed(seed)
    return {name: nn.Parameter(torch.randn(size, generator=generator)) for name, size in SIZES.items()}


def groups(held: dict[str, nn.Parameter], rate: float = 1e-2) -> list[ParameterGroup]:
    """One group for each weight, at one rate."""
    return [ParameterGroup(name, rate, {name: p}) for name, p in held.items()]


def train(held: dict[str, nn.Parameter], stepped: OptimizerSet, start: int, stop: int) -> None:
    """Pull every weight towards a target that moves with the step."""
    for step in range(start, stop):
        stepped.training(True)
        for name, parameter in held.items():
            target = torch.full_like(parameter, 0.1 * step + len(name))
            ((parameter - target) ** 2).mean().backward()
        stepped.step()
        stepped.zero_grad()


@pytest.mark.parametrize("name", [*BUILT_IN, *DOTTED])
def test_resuming_is_bit_identical(name, tmp_path):
    """Six steps equal three steps, a state folder, and three more."""
    choice = choose(name, {"momentum": 0.9} if name == "SGD" else {})
    whole, half = parameters(), parameters()
    straight, first = OptimizerSet(choice, groups(whole)), OptimizerSet(choice, groups(half))
    train(whole, straight, 0, 6)
    train(half, first, 0, 3)
    tensors, skeleton = state.optimizer_tensors(first.state_dict())
    weights = {key: p.detach().clone() for key, p in half.items()}
    state.save(tmp_path / "x-state", state.RunState({"optimizer": tensors, "w": weights}, {"optimizer": skeleton}))
    loaded = state.load(tmp_path / "x-state")

    again = parameters(seed=7)
    for key, parameter in again.items():
        parameter.data.copy_(loaded.tensors["w"][key])
    second = OptimizerSet(choice, groups(again))
    second.load_state_dict(state.optimizer_states(loaded.tensors.get("optimizer", {}), loaded.scalars["optimizer"]))
    train(again, second, 3, 6)
    moved = [not torch.equal(whole[key], parameters()[key]) for key in whole]
    assert all(moved), f"{name} does not train"
    for key in whole:
        assert torch.equal(whole[key], again[key]), f"{name}: {key} differs after resuming"


def test_prodigy_gets_one_instance_for_each_rate():
    """prodigyopt refuses unequal rates in one instance."""
    held = parameters()
    unequal = [ParameterGroup("small", 1.0, {"s": held["small"]}), ParameterGroup("large", 0.5, {"l": held["large"]})]
    stepped = OptimizerSet(choose("prodigy", {}), unequal)
    assert len(stepped.optimizers) == 2
    before = [p.detach().clone() for p in held.values()]
    train(held, stepped, 0, 3)
    assert all(not torch.equal(a, b) for a, b in zip(before, held.values(), strict=True))
    assert len(OptimizerSet(choose("Prodigy", {}), groups(held)).optimizers) == 1
    assert len(OptimizerSet(choose("AdamW", {}), unequal).optimizers) == 1


def test_effective_rate_of_prodigy_is_d_times_lr():
    """The rate shown is the one that acts."""
    held = parameters()
    stepped = OptimizerSet(choose("Prodigy", {"d0": 1e-4}), groups(held, 1.0))
    stepped.set_rates(0.5)
    train(held, stepped, 0, 2)
    d = next(stepped.groups())["d"]
    assert stepped.effective_rates() == {"small": pytest.approx(d * 0.5), "large": pytest.approx(d * 0.5)}
    assert stepped.rates() == {"small": 0.5, "large": 0.5}


def test_rates_follow_the_factor_and_survive_loading():
    """A resumed run takes its rates from its own configuration."""
    held = parameters()
    stepped = OptimizerSet(choose("AdamW", {}), groups(held, 2e-3))
    stepped.set_rates(0.25)
    saved = stepped.state_dict()
    other = OptimizerSet(choose("AdamW", {}), groups(held, 7e-3))
    other.load_state_dict(saved)
    assert set(other.rates().values()) == {7e-3}
    assert set(stepped.rates().values()) == {5e-4}


def test_weight_decay_of_a_group():
    """A group's own decay wins over the optimizer's."""
    held = parameters()
    own = [
        ParameterGroup("small", 1e-3, {"s": held["small"]}, 0.5),
        ParameterGroup("large", 1e-3, {"l": held["large"]}),
    ]
    decays = {g["name"]: g["weight_decay"] for g in OptimizerSet(choose("AdamW", {"weight_decay": 1e-4}), own).groups()}
    assert decays == {"small": 0.5, "large": 1e-4}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("AdmW", "did you mean 'AdamW'"),
        ("os.system", "not a subclass of torch.optim.Optimizer"),
        ("torch.nn.Linear", "not a subclass"),
        ("torch.optim.NoSuch", "has no 'NoSuch'"),
        ("nosuchpackage.Optimizer", "no module 'nosuchpackage'"),
    ],
)
def test_wrong_optimizers_are_refused(name, message):
    """A plain message, and nothing is called."""
    with pytest.raises(ConfigError, match=message):
        choose(name, {})


def test_wrong_arguments_are_refused_with_the_nearest_right_one():
    """The signature is checked before an instance is made."""
    with pytest.raises(ConfigError, match="no 'weight_dcay'; did you mean 'weight_decay'"):
        choose("AdamW", {"weight_dcay": 0.1})
    with pytest.raises(ConfigError, match="'lr' is set by learning_rate"):
        choose("AdamW", {"lr": 0.1})
    with pytest.raises(ConfigError, match="refuses its arguments"):
        OptimizerSet(choose("AdamW", {"betas": (2.0, 0.9)}), groups(parameters()))


def test_arguments_are_read_as_python_literals():
    """Numbers, booleans in either spelling, tuples with or without brackets."""
    assert parse_arguments(["weight_decay=0.01", "betas=0.9,0.99", "decouple=true", "beta3=None", "eps=1e-8"]) == {
        "weight_decay": 0.01,
        "betas": (0.9, 0.99),
        "decouple": True,
        "beta3": None,
        "eps": 1e-8,
    }
    with pytest.raises(ConfigError, match="name=value"):
        parse_arguments(["weight_decay"])
    with pytest.raises(ConfigError, match="given twice"):
        parse_arguments(["a=1", "a=2"])


def test_a_missing_package_names_the_command_that_installs_it(monkeypatch):
    """Optional optimizers say how to get them."""

    def missing(name):
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(optimizers.importlib, "import_module", missing)
    with pytest.raises(ConfigError, match="pip install schedulefree"):
        choose("AdamWScheduleFree", {})


WRONG = [
    ("AdamW", "weight_decai=1", "takes no 'weight_decai'; did you mean 'weight_decay'"),
    ("AdamW", "betas=5", "betas = 5: AdamW takes 2 numbers there, as betas=0.9,0.999"),
    ("AdamW", "betas=0.9,0.99,0.999", "takes 2 numbers"),
    ("AdamW8bit", "is_paged=5", "takes true or false"),
    ("PagedAdamW", "betas=x", "takes 2 numbers"),
    ("Prodigy", "d0=big", "takes a number there, as d0=1e-06"),
    ("Prodigy", "d00=1", "did you mean 'd0'"),
    ("Adafactor", "relative_step=1", "takes true or false"),
    ("Lion", "lr=1", "'lr' is set by learning_rate"),
    ("RAdamScheduleFree", "warm=1", "takes no 'warm'"),
    ("torch.optim.NAdam", "momentum_decay=true", "takes a number"),
    ("torch.optim.LBFGS", "history_size=3", "cannot train here: its step calls the model again"),
    ("torch.optim.SparseAdam", "eps=1e-8", "sparse gradients alone"),
    ("nosuchpackage.Optimizer", "a=1", "there is no module 'nosuchpackage'"),
]


@pytest.mark.parametrize(("name", "argument", "message"), WRONG)
def test_the_source_tells_what_an_optimizer_takes(name, argument, message):
    """Names and kinds of values, by the package's own source; nothing is imported for it."""
    with pytest.raises(ConfigError, match=message):
        optimizer_arguments.check(name, [argument])


@pytest.mark.parametrize("name", [*BUILT_IN, *DOTTED])
def test_the_source_and_the_class_agree(name):
    """For every built-in: the arguments that parsing finds are those of the class."""
    import inspect

    choice = choose(name, {})
    found = optimizer_arguments._signature(optimizer_arguments.path_of(name), name)
    parameters = {key: one.default for key, one in inspect.signature(choice.factory.__init__).parameters.items()}
    assert list(found.defaults) == list(parameters)
    assert all(parameters[key] == value for key, value in found.defaults.items() if value is not None)
    assert optimizer_arguments.check(name, []) == ""


def test_a_class_whose_source_says_nothing_is_left_to_the_run(tmp_path, monkeypatch):
    """As one that inherits its arguments."""
    (tmp_path / "ownoptimizer.py").write_text("import torch\nclass Mine(torch.optim.SGD):\n    pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert "checked when the run starts" in optimizer_arguments.check("ownoptimizer.Mine", ["momentum=0.9"])
    try_out(choose("ownoptimizer.Mine", {"momentum": 0.9}), 1e-3, torch.device("cpu"))


@pytest.mark.parametrize("name", [*BUILT_IN, *DOTTED])
def test_every_optimizer_can_be_tried_out(name):
    """On a parameter of its own."""
    try_out(choose(name, {"momentum": 0.9} if name == "SGD" else {}), 1e-3, torch.device("cpu"))


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("AdamW", {"betas": 5}),
        ("torch.optim.LBFGS", {}),
        ("torch.optim.SparseAdam", {}),
        ("AdamW", {"betas": (2.0, 0.9)}),
    ],
)
def test_what_cannot_step_is_refused_by_trying(name, arguments):
    """With a plain message."""
    with pytest.raises(ConfigError, match="refuses its arguments|cannot take a step here"):
        try_out(choose(name, arguments), 1e-3, torch.device("cpu"))
