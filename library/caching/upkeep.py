"""--status, --verify and --gc: what is in the cache, whether it is sound, and giving up what nobody names.

Nothing is ever deleted but by --gc, and that only what no manifest in the folder counts on.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass

from tqdm import tqdm

from library.caching.configurations import chosen, configurations, lines
from library.caching.estimate import megabytes
from library.caching.session import Session, wanted
from library.config.tables import CommandTable
from library.data import readers
from library.data.manifest import config_path
from library.data.plan import Plan
from library.data.store import DAMAGED, Store, entry_facts
from library.errors import CacheError
from library.tensorfile import TensorFileError

log = logging.getLogger("influx")

MOST_NAMED = 20


@dataclass(frozen=True)
class Status:
    """The entries of a plan against the cache, by name. stale: name -> what differs from the entry that is there."""

    fresh: int
    stale: dict[str, str]
    missing: list[str]
    orphaned: list[str]
    broken: dict[str, str]

    def lines(self) -> Iterator[str]:
        """For people: counts, then names."""
        yield (
            f"fresh: {self.fresh}, stale: {len(self.stale)}, missing: {len(self.missing)}, "
            f"orphaned: {len(self.orphaned)}, damaged shards: {len(self.broken)}"
        )
        groups = {
            "stale": [f"{name} ({reason})" for name, reason in self.stale.items()],
            "missing": self.missing,
            "orphaned": self.orphaned,
            "damaged": [f"{name} ({reason})" for name, reason in self.broken.items()],
        }
        for word, names in groups.items():
            yield from (f"  {word}: {name}" for name in names[:MOST_NAMED])
            if len(names) > MOST_NAMED:
                yield f"  {word}: ... and {len(names) - MOST_NAMED} more"


def is_asked(command: CommandTable) -> bool:
    """Whether this call looks after the cache instead of filling it."""
    return command.status or command.gc or command.verify


def upkeep(session: Session, plan: Plan) -> int:
    """Do what was asked. Raises CacheError if --verify found damage."""
    if session.run.command.verify:
        verify(session.store)
    if session.run.command.gc:
        collect(session, plan)
    for line in (*status_of(session, plan).lines(), *lines(configurations(session))):
        log.info("%s", line)
    return 0


def status_of(session: Session, plan: Plan) -> Status:
    """Compare what the configuration needs with what is there."""
    store = session.store
    asked = _asked(session, plan)
    facts = {
        fingerprint: fact
        for name in store.shards
        for fingerprint, fact in entry_facts(store.folder / name).items()
        if store.where[fingerprint] == name
    }
    by_name: dict[str, list[str]] = {}
    for fingerprint, fact in facts.items():
        by_name.setdefault(fact.get("name", ""), []).append(fingerprint)
    stale, missing, replaced = {}, [], set()
    for fingerprint, (name, content) in asked.items():
        if fingerprint in store:
            continue
        others = [other for other in by_name.get(name, []) if other not in asked] if content else []
        if others:
            reasons = {other: _difference(facts[other].get("made_of", {}), content) for other in others}
            nearest = min(others, key=lambda other: len(reasons[other]))
            stale[name] = ", ".join(reasons[nearest])
            replaced.add(nearest)
        else:
            missing.append(name)
    kept = _kept_by_manifests(session)
    orphaned = [
        str(facts[fingerprint].get("name") or facts[fingerprint].get("caption", fingerprint))
        for fingerprint in facts
        if fingerprint not in asked and fingerprint not in kept and fingerprint not in replaced
    ]
    return Status(len([one for one in asked if one in store]), stale, missing, orphaned, dict(store.broken))


def _asked(session: Session, plan: Plan) -> dict[str, tuple[str, dict]]:
    """Name and content of every entry the plan needs."""
    images = {fingerprint: (recipe.pair.key, recipe.content) for fingerprint, recipe in plan.recipes.items()}
    previews = {one.fingerprint: (f"preview: {one.request.prompt[:60]}", {}) for one in plan.previews}
    texts = {session.texts.fingerprint(caption): (f"caption: {caption[:60]}", {}) for caption in plan.captions}
    return images | previews | texts


def _difference(old: dict, new: dict) -> list[str]:
    """Names of what two entries of one item do not share."""
    words = {"source": "source image", "target": "target image", "vae": "VAE", "latents_as": "cache_latents_as"}
    keys = [key for key in dict.fromkeys([*old, *new]) if _plain(old.get(key)) != _plain(new.get(key))]
    found = []
    for key in keys:
        if key == "geometry" and key in old:
            found += [name for name in new[key] if _plain(old[key].get(name)) != _plain(new[key][name])]
        else:
            found.append(words.get(key, key))
    return [f"{name} changed" for name in found]


def _plain(value: object) -> object:
    """Tuples and lists are one thing in JSON."""
    return [_plain(part) for part in value] if isinstance(value, list | tuple) else value


def _kept_by_manifests(session: Session) -> set[str]:
    """Entries that other configurations' manifests count on; this one's is replaced by the plan."""
    return {entry for one in configurations(session) if not one.is_present for entry in one.entries}


def verify(store: Store) -> None:
    """Read everything and compare checksums. Damaged shards are set aside and raise CacheError when all is read."""
    import torch

    from library.data.reader import Reader
    from library.data.store import checksum

    damaged: dict[str, list[str]] = {name: [reason] for name, reason in store.broken.items()}
    reader = Reader(store)
    for name in tqdm(sorted(store.shards), desc="verifying", unit="shard", disable=None):
        try:
            facts = entry_facts(store.folder / name)
        except TensorFileError as error:
            damaged[name] = [str(error)]
            continue
        for fingerprint, fact in facts.items():
            if store.where[fingerprint] != name:
                continue
            tensors = reader.entry(fingerprint)
            whole = all(bool(torch.isfinite(part).all()) for part in tensors.values() if part.is_floating_point())
            if checksum(tensors) != fact.get("sha256") or not whole:
                damaged.setdefault(name, []).append(str(fact.get("name") or fact.get("caption", fingerprint)))
    reader.close()
    num_entries = len(store.where)
    for name in damaged:
        store.set_aside(name)
    if damaged:
        store.reload()
        store.save_index()
        lines = "\n  ".join(f"{name}: {', '.join(entries[:10])}" for name, entries in damaged.items())
        raise CacheError(
            f"{len(damaged)} damaged shards were set aside (renamed to *{DAMAGED}):\n  {lines}\n"
            "Run influx_cache.py again to encode their entries anew."
        )
    log.info("verified: all %d entries are as they were written", num_entries)


def collect(session: Session, plan: Plan) -> None:
    """Delete what no configuration names. A shard that is needed in part is rewritten first; one that a running trainer
    reads is left."""
    store = session.store
    given_up = chosen(configurations(session), session.run.command.give_up)
    with readers.none_begins(store.folder) as held:
        for one in given_up:
            one.path.unlink()
            config_path(one.path).unlink(missing_ok=True)
            log.info("gc: gave up the configuration %s (%s)", one.name, ", ".join(one.subsets))
        live = (wanted(plan, session.texts) | _kept_by_manifests(session)) & set(store.where)
        freed, left = _remove_dead(store, live, held)
    store.reload()
    store.save_index()
    log.info("gc: removed %s that no configuration names", megabytes(freed))
    if left:
        log.info("gc: left %d shards that running trainers (%d) read; ask again when they are done", left, held.count)


def _remove_dead(store: Store, live: set[str], held: readers.Held) -> tuple[int, int]:
    """Bytes of what was removed, and how many shards were not because they are held."""
    freed = left = 0
    for name, shard in list(store.shards.items()):
        keep = [one for one in shard.fingerprints if one in live and store.where[one] == name]
        if len(keep) == len(shard.fingerprints):
            continue
        if name in held:
            left += 1
            continue
        if keep:
            _rewrite(store, name, keep)
        freed += shard.size
        store.remove(name)
    for path in [*store.folder.glob(f"*/*{DAMAGED}"), *store.folder.glob(f"*/*/*{DAMAGED}")]:
        freed += path.stat().st_size
        path.unlink()
    for name in list(store.broken):
        freed += (store.folder / name).stat().st_size
        store.remove(name)
    return freed, left


def _rewrite(store: Store, name: str, keep: list[str]) -> None:
    """Write the entries to keep of a shard into a new one."""
    from library.data.reader import Reader
    from library.data.store import Entry

    facts = entry_facts(store.folder / name)
    reader = Reader(store)
    entries = [Entry(one, reader.entry(one), facts[one]) for one in keep]
    kind, *rest = name.split("/")
    width_height = tuple(int(side) for side in rest[0].split("x")) if kind == "image" else None
    store.add(kind, width_height, entries)
    reader.close()
