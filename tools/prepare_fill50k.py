"""Brings the real my_fill50k archive (ControlNet's fill50k) into the folders that the examples use.

    python tools/prepare_fill50k.py --input_dir fill50k --output_dir data/my_fill50k --prefix "FILLCIRCLE:"

The input folder holds prompt.json, one JSON object a line: {"source": "source/0.png", "target": "target/0.png",
"prompt": "..."} with paths relative to it. Written are train_A (sources), train_B (targets), train_combined (side by
side), prompts and prompts_combined (one .txt per image; the latter with the prefix).
"""

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, UnidentifiedImageError


class PrepareError(ValueError):
    """Something in the archive that the user can mend."""


@dataclass(frozen=True)
class Record:
    """One line of the JSON file."""

    line: int
    source: Path
    target: Path
    prompt: str

    @property
    def stem(self) -> str:
        """The name that all files of the pair get."""
        return self.source.stem


def read_records(json_file: Path, input_dir: Path, limit: int | None = None) -> list[Record]:
    """The lines of the JSON file; complains with the line number."""
    if not json_file.is_file():
        raise PrepareError(f"no file {json_file}: unpack the archive and pass its folder as --input_dir")
    records: list[Record] = []
    seen: dict[str, int] = {}
    for number, text in enumerate(json_file.read_text(encoding="utf-8-sig").splitlines(), start=1):
        if limit is not None and len(records) == limit:
            break
        if text.strip():
            record = parse_line(text, number, json_file, input_dir)
            if record.stem in seen:
                raise PrepareError(
                    f"{json_file} lines {seen[record.stem]} and {number} have the same name {record.stem!r}"
                )
            seen[record.stem] = number
            records.append(record)
    if not records:
        raise PrepareError(f"{json_file} holds no lines")
    return records


def parse_line(text: str, number: int, json_file: Path, input_dir: Path) -> Record:
    """One JSON object with the three strings source, target and prompt."""
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise PrepareError(f"{json_file} line {number} is no JSON object ({error.msg}): {text[:80]!r}") from error
    for key in ("source", "target", "prompt"):
        if not isinstance(values, dict) or not isinstance(values.get(key), str):
            raise PrepareError(f"{json_file} line {number} lacks the text {key!r}: {text[:80]!r}")
    return Record(number, input_dir / values["source"], input_dir / values["target"], values["prompt"].strip())


def open_image(path: Path, line: int) -> Image.Image:
    """An RGB image; complains with the path and the JSON line."""
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except FileNotFoundError as error:
        raise PrepareError(f"{path} does not exist (JSON line {line})") from error
    except (UnidentifiedImageError, OSError) as error:
        raise PrepareError(f"{path} is no readable image (JSON line {line})") from error


def side_by_side(source: Image.Image, target: Image.Image) -> Image.Image:
    """Source left, target right."""
    image = Image.new("RGB", (source.width + target.width, source.height))
    image.paste(source, (0, 0))
    image.paste(target, (source.width, 0))
    return image


def prepare_record(record: Record, output_dir: Path, prefix: str, size: int | None) -> None:
    """Write the five files of a pair."""
    source, target = open_image(record.source, record.line), open_image(record.target, record.line)
    if source.size != target.size:
        raise PrepareError(
            f"{record.source} is {source.size} but {record.target} is {target.size} (JSON line {record.line})"
        )
    if size is not None:
        if source.width != source.height:
            raise PrepareError(
                f"--size needs square images, {record.source} is {source.size} (JSON line {record.line})"
            )
        source, target = (image.resize((size, size), Image.Resampling.LANCZOS) for image in (source, target))
    prefixed = f"{prefix.rstrip()} {record.prompt}" if prefix.strip() else record.prompt
    (output_dir / "prompts" / f"{record.stem}.txt").write_text(record.prompt + "\n", encoding="utf-8")
    (output_dir / "prompts_combined" / f"{record.stem}.txt").write_text(prefixed + "\n", encoding="utf-8")
    source.save(output_dir / "train_A" / f"{record.stem}.png")
    target.save(output_dir / "train_B" / f"{record.stem}.png")
    side_by_side(source, target).save(output_dir / "train_combined" / f"{record.stem}.png")


def prepare(
    input_dir: Path,
    output_dir: Path,
    prefix: str = "",
    size: int | None = None,
    limit: int | None = None,
    json_file: Path | None = None,
) -> int:
    """Prepare the archive and return the number of pairs."""
    if size is not None and (size < 16 or size % 16):
        raise PrepareError(f"--size must be a positive multiple of 16, not {size}")
    records = read_records(json_file or input_dir / "prompt.json", input_dir, limit)
    for name in ("train_A", "train_B", "train_combined", "prompts", "prompts_combined"):
        (output_dir / name).mkdir(parents=True, exist_ok=True)
    for record in records:
        prepare_record(record, output_dir, prefix, size)
    return len(records)


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input_dir", type=Path, required=True, help="the unpacked archive")
    parser.add_argument("--output_dir", type=Path, default=Path("data/my_fill50k"))
    parser.add_argument("--json_file", type=Path, help="default: prompt.json in the input folder")
    parser.add_argument("--prefix", default="", help="put before each caption in prompts_combined, with a space")
    parser.add_argument("--size", type=int, help="resize the square images to this side; a multiple of 16")
    parser.add_argument("--limit", type=int, help="only the first so many pairs")
    options = parser.parse_args()
    try:
        count = prepare(
            options.input_dir, options.output_dir, options.prefix, options.size, options.limit, options.json_file
        )
    except PrepareError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{count} pairs are ready in {options.output_dir}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
