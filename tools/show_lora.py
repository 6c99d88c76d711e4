"""Show what a network's file holds and says about itself.

    python -m tools.show_lora NET.safetensors [--config]

Reads the header alone; --config prints the configuration it was trained with.
"""

import argparse
import json
from collections import Counter
from pathlib import Path

from tools.lora_arguments import run


def main(options: argparse.Namespace) -> None:
    """Print size, kinds and ranks, then the metadata."""
    from library.networks import names
    from library.tensorfile import data_hash, read_header

    header = read_header(options.network)
    if options.config:
        print(header.metadata.get("influx_config", "").rstrip() or "the file holds no configuration")
        return
    meanings = {name: names.parse(name) for name in header.tensors}
    spellings = Counter(meaning.place.spelling if meaning else "unknown" for meaning in meanings.values())
    ranks = Counter(
        info.shape[0] for name, info in header.tensors.items()
        if meanings[name] is not None and meanings[name].tensor == "lora_down.weight"
    )  # fmt: skip
    dtypes = Counter(info.dtype for info in header.tensors.values() if info.shape)
    modules = {meaning.place for meaning in meanings.values() if meaning is not None}
    print(f"{options.network}: {options.network.stat().st_size / 1e6:.1f} MB, {len(modules)} modules")
    print(f"names: {_counted(spellings)}; ranks: {_counted(ranks) or 'none'}; precision: {_counted(dtypes)}")
    stated, actual = header.metadata.get("sshs_model_hash"), data_hash(options.network)
    print(f"data hash: {actual}{'' if stated in (None, actual) else f' BUT THE FILE SAYS {stated}: it was altered'}")
    for name, text in sorted(header.metadata.items()):
        if name not in ("influx_config", "modelspec.thumbnail", "ssmd_cover_images"):
            print(f"  {name} = {_short(text)}")


def _counted(counts: Counter) -> str:
    return ", ".join(f"{name} ({count})" for name, count in sorted(counts.items(), key=lambda item: -item[1]))


def _short(text: str) -> str:
    line = json.dumps(text, ensure_ascii=False)[1:-1]
    return line if len(line) <= 160 else line[:157] + "..."


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("network", type=Path)
    parser.add_argument("--config", action="store_true", help="print the configuration of the run that made it")
    raise SystemExit(run(main, parser))
