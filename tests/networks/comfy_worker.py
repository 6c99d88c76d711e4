"""ComfyUI's own loading code in a process of its own: reads one JSON request a line, answers each with one JSON line.

It runs apart from pytest because it stubs packages that ComfyUI imports but does not use here (torchvision, av, scipy,
...); a stub would change what transformers and diffusers believe to be installed.
"""

import importlib.machinery
import inspect
import json
import logging
import sys
import types
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
STUBBED = {
    "torchvision",
    "torchaudio",
    "av",
    "kornia",
    "spandrel",
    "scipy",
    "torchsde",
    "glfw",
    "OpenGL",
}


class Stub(types.ModuleType):
    """A module in which every name is again such a module."""

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        made = stub(f"{self.__name__}.{name}")
        setattr(self, name, made)
        return made

    def __call__(self, *args, **kwargs):
        return self


def stub(name: str) -> Stub:
    made = Stub(name)
    made.__path__ = []
    made.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
    sys.modules[name] = made
    return made


class StubFinder:
    def find_spec(self, name: str, path=None, target=None):
        if name.split(".")[0] in STUBBED:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        return stub(spec.name)

    def exec_module(self, module) -> None:
        return None


sys.meta_path.append(StubFinder())
stub("server")  # some node modules ask the web server for its address; there is none here
sys.path.insert(0, str(ROOT / "vendor" / "ComfyUI"))
sys.path.append(str(ROOT / "vendor" / "comfy_packages"))
answers, sys.stdout = sys.stdout, sys.stderr  # ComfyUI prints; the answers must stay apart

import torch  # noqa: E402

torch.set_num_threads(1)

import comfy.options  # noqa: E402

comfy.options.enable_args_parsing(False)

import comfy.cli_args  # noqa: E402

comfy.cli_args.args.cpu = True

import comfy.quant_ops  # noqa: E402

# Without its optional kernels ComfyUI falls back to torch, which the line above made it do; one model file that is not
# used here insists on the name.
sys.modules["comfy_kitchen"] = types.ModuleType("comfy_kitchen")

import comfy.lora  # noqa: E402
import comfy.lora_convert  # noqa: E402
import comfy.samplers  # noqa: E402
import comfy.sd  # noqa: E402
import comfy.utils  # noqa: E402
from safetensors.torch import save_file  # noqa: E402


class Unread(logging.Handler):
    """Collects what ComfyUI says it did not load."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if "not loaded" in text.lower() or "ERROR" in text:
            self.lines.append(text)


comfy.model_management.in_training = True  # rotation in plain torch, as ComfyUI trains, instead of its optional kernels
unread = Unread()
logging.getLogger().addHandler(unread)
bases: dict[str, object] = {}


def base(path: str):
    """The model patcher of a base checkpoint, loaded as ComfyUI's UNETLoader does."""
    if path not in bases:
        state = comfy.utils.load_torch_file(path)
        bases[path] = comfy.sd.load_diffusion_model_state_dict(state, {"dtype": torch.float32})
        if bases[path] is None:
            raise ValueError(f"ComfyUI does not recognise {path}")
    return bases[path]


def detect(request: dict) -> dict:
    patcher = base(request["base"])
    return {"model": type(patcher.model).__name__, "config": type(patcher.model.model_config).__name__}


def with_network(request: dict):
    patcher = base(request["base"])
    for file, strength in request["networks"]:
        tensors, metadata = comfy.utils.load_torch_file(file, safe_load=True, return_metadata=True)
        patcher, _ = comfy.sd.load_lora_for_models(patcher, None, tensors, strength, 0.0, lora_metadata=metadata)
    return patcher


def deltas(request: dict) -> dict:
    """Load networks; write the change of every weight that moved; report what was not read."""
    unread.lines.clear()
    patcher = with_network(request)
    before = patcher.model.state_dict()
    changes = {}
    for key, patches in patcher.patches.items():
        weight = before[key].clone().float()
        after = comfy.lora.calculate_weight(patches, weight.clone(), key, intermediate_dtype=torch.float32)
        changes[key.removeprefix("diffusion_model.")] = (after - weight).contiguous()
    save_file(changes, request["output"])
    return {"unread": list(unread.lines), "changed": len(changes)}


def forward(request: dict) -> dict:
    """One call of ComfyUI's FLUX class, networks patched in, on given inputs; the output is written to a file."""
    unread.lines.clear()
    patcher = with_network(request)
    patcher.patch_model(device_to=torch.device("cpu"))
    try:
        given = comfy.utils.load_torch_file(request["inputs"])
        conditions = {
            "concat_latent_image": given["concat_latents"],
            "noise": given["latents"],
            "device": torch.device("cpu"),
        }
        if "mask" in given:
            conditions["denoise_mask"] = given["mask"]
        model = patcher.model
        concat = model.concat_cond(**conditions)
        latents = torch.cat([given["latents"], concat], dim=1)
        with torch.no_grad():
            output = model.diffusion_model(
                latents, given["timestep"], given["context"], given["pooled"], given["guidance"], transformer_options={}
            )
    finally:
        patcher.unpatch_model()
    save_file({"output": output.contiguous(), "concat": concat.contiguous()}, request["output"])
    return {"unread": list(unread.lines)}


def text_keys(request: dict) -> dict:
    """Which modules of CLIP-L ComfyUI finds for the keys of a file."""
    import comfy.clip_model

    config = {
        "num_hidden_layers": request["layers"], "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64,
        "hidden_act": "quick_gelu", "max_position_embeddings": 77, "eos_token_id": 1,
    }  # fmt: skip
    unread.lines.clear()

    class Holder(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.clip_l = torch.nn.Module()
            self.clip_l.transformer = comfy.clip_model.CLIPTextModel(config, torch.float32, "cpu", torch.nn)

    key_map = comfy.lora.model_lora_keys_clip(Holder(), {})
    loaded = comfy.lora.load_lora(comfy.utils.load_torch_file(request["network"]), key_map)
    return {"unread": list(unread.lines), "loaded": sorted(loaded)}


def sigmas(request: dict) -> dict:
    """The sigmas that ModelSamplingFlux and a scheduler give for a size."""
    from comfy_extras.nodes_model_advanced import ModelSamplingFlux

    (patched,) = ModelSamplingFlux().patch(
        base(request["base"]), request["max_shift"], request["base_shift"], request["width"], request["height"]
    )
    sampling = patched.get_model_object("model_sampling")
    return {"sigmas": comfy.samplers.calculate_sigmas(sampling, request["scheduler"], request["steps"]).tolist()}


def node_definitions(request: dict) -> dict:
    """Inputs and outputs of every node class of ComfyUI's core and of the named extra modules."""
    import importlib

    import nodes

    classes = dict(nodes.NODE_CLASS_MAPPINGS)
    for name in request["extras"]:
        module = importlib.import_module(f"comfy_extras.{name}")
        classes.update(getattr(module, "NODE_CLASS_MAPPINGS", {}))
        for _, kind in inspect.getmembers(module, inspect.isclass):
            if hasattr(kind, "define_schema") and kind.__module__ == module.__name__:
                classes[kind.define_schema().node_id] = kind
    return {name: definition(kind) for name, kind in classes.items() if name in request["names"]}


def definition(kind) -> dict:
    inputs = kind.INPUT_TYPES()
    found = {}
    for section in ("required", "optional"):
        for name, declared in inputs.get(section, {}).items():
            options = declared[1] if len(declared) > 1 and isinstance(declared[1], dict) else {}
            choices = declared[0] if isinstance(declared[0], list) else options.get("options")
            found[name] = {
                "type": "COMBO" if isinstance(declared[0], list) else str(declared[0]),
                "required": section == "required",
                "choices": [str(choice) for choice in choices] if choices else None,
                "min": options.get("min"), "max": options.get("max"), "step": options.get("step"),
            }  # fmt: skip
    return {"inputs": found, "outputs": [str(output) for output in kind.RETURN_TYPES]}


ACTIONS = {
    "detect": detect, "deltas": deltas, "forward": forward, "text_keys": text_keys, "sigmas": sigmas,
    "node_definitions": node_definitions,
}  # fmt: skip


def main() -> None:
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        answer = ACTIONS[request["action"]](request)
        print(json.dumps(answer), file=answers, flush=True)


main()
