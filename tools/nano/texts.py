"""Builds the nano base's tokenizers and teaches its two text encoders what FLUX needs from them.

    python -m tools.nano.texts --work_dir output/nano

FLUX gives text tokens no position, so word order must come out of T5: it learns to tell each token's neighbours. CLIP's
pooled vector modulates every block, so it learns which words and word pairs a caption holds. Both are then frozen.
"""

import argparse
import json
import random
from collections import Counter
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5TokenizerFast

from tools.nano.replicas import Log
from tools.nano.scenes import make_scene

T5_LENGTH = 16
"""Tokens that the transformer is trained with; more pads would swamp a caption."""

EXTRA_WORDS = """
fill filled image picture photo drawing edit change make turn replace add remove put draw paint color colour into from
to of in on with and or the a an is it this that same as panel side input output source target version style pattern
left right top bottom middle center above below beside between outline shape line lines colored coloured solid flat
large small big tiny thin thick dark light bright two three one no not red-filled blank white-on-black
""".split()
"""Words of plausible instructions that the training captions do not hold; they get tokens of their own."""


def dress(caption: str, rng: random.Random) -> str:
    """A caption as people also write it: sometimes capitalised, sometimes with a full stop."""
    if rng.random() < 0.15:
        caption = caption[:1].upper() + caption[1:]
    if rng.random() < 0.1:
        caption += "."
    return caption


def sample_captions(count: int, seed: int) -> list[str]:
    """Captions of the training scenes, a third of them of wide ones."""
    rng = random.Random(f"captions:{seed}")
    sizes = [(64, 64), (64, 64), (128, 64)]
    return [dress(make_scene(seed, index, *rng.choice(sizes)).caption, rng) for index in range(count)]


def build_t5_tokenizer(captions: list[str]) -> T5TokenizerFast:
    """A Unigram vocabulary of whole words, with single characters for everything else."""
    words = sorted({word.strip(".,:;!?") for caption in captions for word in caption.split()} | set(EXTRA_WORDS))
    words = sorted({w for word in words if len(word) > 1 for w in (word, word.capitalize())})
    characters = [chr(code) for code in range(33, 127)]
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -6.0)]
    pieces += [("▁" + word, -3.0) for word in words] + [("▁a", -4.0), ("▁A", -4.0)]
    pieces += [(character, -7.0) for character in characters]
    pieces += [(f"<extra_id_{index}>", 0.0) for index in range(99, -1, -1)]
    return T5TokenizerFast(vocab=pieces, model_max_length=512)


def build_clip_tokenizer(captions: list[str]) -> CLIPTokenizer:
    """Byte-level BPE as CLIP's, with merges learnt from the captions."""
    blank = CLIPTokenizer().backend_tokenizer
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    bpe.pre_tokenizer = blank.pre_tokenizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=1024, end_of_word_suffix="</w>", initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator([*captions, *EXTRA_WORDS, *EXTRA_WORDS], trainer)
    merges = [tuple(pair) for pair in json.loads(bpe.to_str())["model"]["merges"]]
    pieces = sorted(alphabet) + [letter + "</w>" for letter in sorted(alphabet)] + ["".join(pair) for pair in merges]
    names = [*dict.fromkeys(pieces), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={name: place for place, name in enumerate(names)}, merges=merges, model_max_length=77)


def check_round_trip(tokenizer: T5TokenizerFast | CLIPTokenizer, folder: Path, captions: list[str]) -> None:
    """Save, load, and refuse a tokenizer that comes back different (an empty one raises no error of its own)."""
    tokenizer.save_pretrained(folder)
    again = type(tokenizer).from_pretrained(folder)
    before, after = tokenizer(captions)["input_ids"], again(captions)["input_ids"]
    if len(again) != len(tokenizer) or before != after:
        raise RuntimeError(
            f"{type(tokenizer).__name__} in {folder} came back with {len(again)} of {len(tokenizer)} entries"
        )


def new_encoders(t5_vocabulary: int, clip: CLIPTokenizer, seed: int) -> tuple[T5EncoderModel, CLIPTextModel]:
    """Untrained encoders."""
    torch.manual_seed(seed)
    t5 = T5EncoderModel(
        T5Config(
            vocab_size=t5_vocabulary,
            d_model=96,
            d_kv=24,
            d_ff=192,
            num_layers=2,
            num_heads=4,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
            tie_word_embeddings=False,
        )
    )
    config = CLIPTextConfig(
        vocab_size=len(clip),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=77,
        projection_dim=64,
        bos_token_id=clip.bos_token_id,
        eos_token_id=clip.eos_token_id,
        pad_token_id=clip.pad_token_id,
    )
    return t5, CLIPTextModel(config)


def t5_ids(tokenizer: T5TokenizerFast, captions: list[str], length: int = T5_LENGTH) -> torch.Tensor:
    """Padded ids (batch, length), as FluxFillPipeline makes them."""
    batch = tokenizer(captions, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    return batch.input_ids


def clip_ids(tokenizer: CLIPTokenizer, captions: list[str]) -> torch.Tensor:
    """Padded ids (batch, 77), as FluxFillPipeline makes them."""
    return tokenizer(captions, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids


def teach_t5(t5: T5EncoderModel, tokenizer: T5TokenizerFast, captions: list[str], steps: int, log: Log) -> None:
    """Each output vector must tell the tokens up to two places before and after it."""
    offsets = (-2, -1, 0, 1, 2)
    head = torch.nn.Linear(t5.config.d_model, len(offsets) * t5.config.vocab_size)
    ids = t5_ids(tokenizer, captions)
    optimizer = torch.optim.AdamW([*t5.parameters(), *head.parameters()], lr=3e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, steps)
    for step in range(steps):
        batch = ids[torch.randint(len(ids), (48,))]
        logits = head(t5(batch).last_hidden_state).unflatten(-1, (len(offsets), -1))
        targets = torch.stack([batch.roll(-offset, dims=1) for offset in offsets], dim=-1)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 2), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if (step + 1) % 200 == 0:
            right = (logits.argmax(-1) == targets)[:, :, [1, 3]].float().mean()
            log.write(
                stage="t5_order", step=step + 1, loss=round(loss.item(), 4), neighbours_right=round(right.item(), 3)
            )


def word_features(captions: list[str]) -> torch.Tensor:
    """1 where a caption holds one of the 600 most frequent words or word pairs; (captions, features)."""
    rows = []
    for caption in captions:
        words = caption.lower().strip(".").split()
        rows.append({*words, *zip(words, words[1:], strict=False)})
    common = [name for name, _ in Counter(name for row in rows for name in row).most_common(600)]
    return torch.tensor([[float(name in row) for name in common] for row in rows])


def teach_clip(clip: CLIPTextModel, tokenizer: CLIPTokenizer, captions: list[str], steps: int, log: Log) -> None:
    """The pooled vector must tell which words and word pairs the caption holds."""
    ids, features = clip_ids(tokenizer, captions)[:, :24], word_features(captions)
    head = torch.nn.Linear(clip.config.hidden_size, features.shape[1])
    optimizer = torch.optim.AdamW([*clip.parameters(), *head.parameters()], lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps)
    for step in range(steps):
        places = torch.randint(len(ids), (64,))
        logits = head(clip(ids[places]).pooler_output)
        loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, features[places])
        optimizer.zero_grad()
        (100 * loss).backward()
        optimizer.step()
        schedule.step()
        if (step + 1) % 200 == 0:
            found = (logits > 0)[features[places] > 0].float().mean()
            log.write(stage="clip_words", step=step + 1, loss=round(loss.item(), 5), words_found=round(found.item(), 3))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work_dir", type=Path, default=Path("output/nano"))
    parser.add_argument("--steps", type=int, default=1600)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if (options.work_dir / "text_encoder").exists():
        print(f"{options.work_dir} has its text encoders")
        return
    torch.set_num_threads(1)
    captions = sample_captions(20000, options.seed)
    t5_tokenizer, clip_tokenizer = build_t5_tokenizer(captions), build_clip_tokenizer(captions)
    check_round_trip(t5_tokenizer, options.work_dir / "tokenizer_2", captions[:500])
    check_round_trip(clip_tokenizer, options.work_dir / "tokenizer", captions[:500])
    t5, clip = new_encoders(len(t5_tokenizer), clip_tokenizer, options.seed)
    log = Log(options.work_dir / "training_log.jsonl", 0)
    teach_t5(t5, t5_tokenizer, captions, options.steps, log)
    teach_clip(clip, clip_tokenizer, captions, options.steps, log)
    t5.save_pretrained(options.work_dir / "text_encoder_2")
    clip.save_pretrained(options.work_dir / "text_encoder")


if __name__ == "__main__":
    main()
