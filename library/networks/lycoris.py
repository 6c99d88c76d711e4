"""LyCORIS algorithms on our linears: LoHa, LoKr, GLoRA, diag-OFT and DoRA, with lycoris-lora's own modules inside.

Its modules are made one by one from explicit sizes, never through its wrapper, whose presets select nothing in a FLUX
transformer and whose class attributes leak from one network into the next. Each adds its update to the base output (the
"bypass" form), so the whole weight is rebuilt only where the algorithm cannot do without.
"""

import os

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from library.errors import ConfigError
from library.flow.draws import key_seed
from library.memory.linear import Adapter, Linear
from library.memory.storage import PlainStorage
from library.networks import factors as arithmetic
from library.networks.arguments import Settings
from library.networks.dropout import Draws, Dropout
from library.networks.factors import Factors
from library.networks.parts import Rows
from library.networks.targets import Target

_KIND_NAMES = {"loha": "loha", "lokr": "lokr", "glora": "glora", "diag-oft": "oft", "locon": "lora", "lora": "lora"}


class LycorisAdapter(Adapter):
    """One lycoris-lora module per row range of a linear; the sum of base output and update."""

    def __init__(self, target: Target, settings: Settings, dropout: Dropout, draws: Draws, linear: Linear, seed: int):
        super().__init__()
        self.name = target.module
        self.kind = _KIND_NAMES[settings.kind]
        self.rank = target.rank
        self.rows: list[Rows] = [group[0] for group in target.groups]
        self.scale = settings.scale_of(target.rank, target.alpha)
        self.dropout = dropout
        self.draws = draws
        modules = [
            _module(settings, target, rows, key_seed(seed, "network_init", self.name, index))
            for index, rows in enumerate(self.rows)
        ]
        self.modules_by_rows = nn.ModuleList(modules).to(linear.device)

    def forward(self, base_output: Tensor, x: Tensor) -> Tensor:
        updates = [module.bypass_forward_diff(x) for module in self.modules_by_rows]
        return self._added(base_output, updates, x)

    def _added(self, base_output: Tensor, updates: list[Tensor], x: Tensor) -> Tensor:
        """base_output with each update on its rows, dropped modules left out."""
        mask = self.dropout.mask(self.name, x[..., :1], self.draws)
        if mask is not None:
            updates = [update * mask for update in updates]
        if self.rows == [(0, base_output.shape[-1])]:
            return base_output + updates[0].to(base_output.dtype)
        pieces, position = [], 0
        for (start, stop), update in zip(self.rows, updates):
            if start > position:
                pieces.append(base_output[..., position:start])
            pieces.append(base_output[..., start:stop] + update.to(base_output.dtype))
            position = stop
        if position < base_output.shape[-1]:
            pieces.append(base_output[..., position:])
        return torch.cat(pieces, dim=-1)

    @torch.no_grad()
    def clamp_norm(self, largest: float) -> tuple[int, float]:
        """Scale down changes that exceed ``largest``; returns how many were, and the largest norm after it."""
        clamped, norms = 0, []
        for (start, stop), module in zip(self.rows, self.modules_by_rows):
            norm = float(self._change_norm(module, start, stop))
            norms.append(min(norm, largest))
            if norm > largest:
                clamped += 1
                for tensor in _scale_carriers(self.kind, module):
                    tensor.mul_(largest / norm)
        return clamped, max(norms)

    def _change_norm(self, module: nn.Module, start: int, stop: int) -> Tensor:
        return _diff(module).norm()

    def factors(self) -> list[tuple[Rows, Factors]]:
        """Each module's tensors with its scale folded in."""
        found = []
        for rows, module in zip(self.rows, self.modules_by_rows):
            tensors = {name: tensor.detach() for name, tensor in module.state_dict().items()}
            alpha = float(tensors.pop("alpha"))
            if self.kind == "oft":
                found.append((rows, Factors("oft", tensors, alpha)))
            else:
                found.append((rows, arithmetic.scaled(self.kind, tensors, float(module.scale))))
        return found


class GloraAdapter(LycorisAdapter):
    """GLoRA: y = W (x + A x) + B x + b. The base layer is asked once per row range, in whatever precision it is."""

    def __init__(self, target: Target, settings: Settings, dropout: Dropout, draws: Draws, linear: Linear, seed: int):
        super().__init__(target, settings, dropout, draws, linear, seed)
        self._linear = (linear,)

    def on(self, linear: Linear, x: Tensor) -> Tensor:
        return self._through(linear.base, x)

    def phantom_on(self, linear: Linear, x: Tensor) -> Tensor:
        return self._through(linear.phantom_base, x)

    def _through(self, base, x: Tensor) -> Tensor:
        mask = self.dropout.mask(self.name, x[..., :1], self.draws)
        outputs, position = [], 0
        whole = len(self.rows) == 1
        plain = None if whole else base(x)
        for (start, stop), module in zip(self.rows, self.modules_by_rows):
            inside = _low_rank(x, module.a2, module.a1) * module.scale
            outside = _low_rank(x, module.b2, module.b1) * module.scale
            if mask is not None:
                inside, outside = inside * mask, outside * mask
            if not whole and start > position:
                outputs.append(plain[..., position:start])
            changed = base(x + inside)
            outputs.append((changed if whole else changed[..., start:stop]) + outside)
            position = stop
        if not whole and position < plain.shape[-1]:
            outputs.append(plain[..., position:])
        return outputs[0] if whole else torch.cat(outputs, dim=-1)

    def _change_norm(self, module: nn.Module, start: int, stop: int) -> Tensor:
        weight = self._linear[0].dequantized(torch.float32)[start:stop]
        change = weight @ module.a1.weight @ module.a2.weight + module.b1.weight @ module.b2.weight
        return change.norm() * module.scale


class OftAdapter(LycorisAdapter):
    """diag-OFT: the base output, its bias apart, rotated block by block (and rescaled, where that is asked for)."""

    reads_base_output = True

    def on(self, linear: Linear, x: Tensor) -> Tensor:
        from lycoris.functional.diag_oft import bypass_forward_diff

        output = linear.base(x)
        plain = output if linear.bias is None else output - linear.bias.to(output.dtype)
        updates = [
            bypass_forward_diff(
                x, plain[..., start:stop], module.oft_blocks, module.rescale if module.rescaled else None,
                constraint=module.constraint,
            )
            for (start, stop), module in zip(self.rows, self.modules_by_rows)
        ]  # fmt: skip
        return self._added(output, updates, x)


class DoraAdapter(LycorisAdapter):
    """DoRA on a LoRA, LoHa or LoKr: the changed weight's direction times a trained magnitude, bias untouched."""

    def __init__(self, target: Target, settings: Settings, dropout: Dropout, draws: Draws, linear: Linear, seed: int):
        super().__init__(target, settings, dropout, draws, linear, seed)
        self.export_rank = settings.export_rank or 2 * target.rank
        self.on_output = bool(settings.algorithm.get("wd_on_output", True))
        weight = linear.dequantized(torch.float32)
        self.magnitude = nn.Parameter(weight.norm(dim=1 if self.on_output else 0, keepdim=True))
        self._linear = (linear,)

    def forward(self, base_output: Tensor, x: Tensor) -> Tensor:
        return self._added(base_output, [F.linear(x, self.change().to(x.dtype))], x)

    def change(self) -> Tensor:
        """What training has made of the weight, less the weight: (out, in), fp32."""
        from lycoris.functional.general import weight_decompose

        weight = self._linear[0].dequantized(torch.float32)
        (module,) = self.modules_by_rows
        return weight_decompose(weight + _diff(module), self.magnitude, 1.0, self.on_output) - weight

    def factors(self) -> list[tuple[Rows, Factors]]:
        """The final change as it is: files carry it as a LoRA, since programs disagree about DoRA's magnitude."""
        return [(self.rows[0], Factors("full", {"diff": self.change().detach()}))]


def _diff(module: nn.Module) -> Tensor:
    """The module's change of the weight, scaled once (lycoris-lora's own getter scales LoHa and LoKr twice)."""
    if hasattr(module, "make_weight"):
        return module.make_weight() * module.scale
    return module.get_weight(module.shape)


def _scale_carriers(kind: str, module: nn.Module) -> tuple[Tensor, ...]:
    """The tensors that the change is linear in, so that scaling them scales it."""
    if kind == "loha":
        return (module.hada_w1_a,)
    if kind == "glora":
        return (module.a1.weight, module.b1.weight)
    return (module.lokr_w2 if module.use_w2 else module.lokr_w2_a,)


def _low_rank(x: Tensor, down: nn.Linear, up: nn.Linear) -> Tensor:
    return F.linear(F.linear(x, down.weight.to(x.dtype)), up.weight.to(x.dtype))


def _module(settings: Settings, target: Target, rows: Rows, seed: int) -> nn.Module:
    """lycoris-lora's module for those rows, at a start drawn from ``seed``; global generators are left as they were."""
    from lycoris.modules.diag_oft import DiagOFTModule
    from lycoris.modules.glora import GLoRAModule
    from lycoris.modules.locon import LoConModule
    from lycoris.modules.loha import LohaModule
    from lycoris.modules.lokr import LokrModule

    # Its compiled kernels start up at the first use of every shape; the plain torch form is what is tested here.
    os.environ.setdefault("LYCORIS_KERNEL_BACKEND", "torch")
    classes = {
        "lora": LoConModule, "locon": LoConModule, "loha": LohaModule, "lokr": LokrModule, "glora": GLoRAModule,
        "diag-oft": DiagOFTModule,
    }  # fmt: skip
    sizes = nn.Linear(target.in_features, rows[1] - rows[0], bias=False, device="meta")
    arguments = {name: value for name, value in settings.algorithm.items() if name != "wd_on_output"}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return classes[settings.kind](
            target.module, sizes, lora_dim=target.rank, alpha=target.alpha, rs_lora=settings.rslora, bypass_mode=True,
            **arguments,
        )  # fmt: skip


_ADAPTERS = {"glora": GloraAdapter, "diag-oft": OftAdapter}


def make(settings: Settings, target: Target, linear: Linear, draws: Draws, seed: int) -> LycorisAdapter:
    """The LyCORIS adapter for ``target``; DoRA where the settings ask for it."""
    if settings.dora and not (linear.storage is None or isinstance(linear.storage, PlainStorage)):
        raise ConfigError(
            f"use_dora: {target.module} is quantised, and DoRA needs the exact weight. Use base_precision = bf16 (or a"
            " checkpoint that is not quantised), or turn use_dora off."
        )
    dropout = Dropout(modules=settings.module_dropout)
    kind = DoraAdapter if settings.dora else _ADAPTERS.get(settings.kind, LycorisAdapter)
    return kind(target, settings, dropout, draws, linear, seed)
