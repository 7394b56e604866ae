"""What needles are made of: two-word keys, numbers and UUIDs, and the words that they and word lists are drawn from."""

from __future__ import annotations

import random
import uuid

ADJECTIVES = (
    "agile", "ample", "ancient", "balmy", "blunt", "bold", "brisk", "broad", "calm", "candid", "cheerful", "chilly",
    "clever", "cloudy", "coarse", "cordial", "crisp", "curious", "dapper", "dense", "distant", "drowsy", "dusty",
    "eager", "early", "earnest", "elastic", "faint", "faithful", "fancy", "fertile", "festive", "fluent", "fragile",
    "frosty", "gentle", "giddy", "graceful", "grand", "hasty", "hearty", "hidden", "hollow", "honest", "humble", "icy",
    "idle", "jolly", "keen", "lavish", "lenient", "level", "limber", "lively", "lofty", "loyal", "lucid", "mellow",
    "merry", "mighty", "mild", "misty", "modest", "narrow", "nimble", "noble", "nocturnal", "orderly", "patient",
    "placid", "plain", "polite", "proud", "prudent", "quaint", "quiet", "rapid", "remote", "rustic", "salty", "sandy",
    "serene", "shady", "shallow", "silent", "sleek", "slender", "solemn", "sparse", "spiral", "sturdy", "subtle",
    "sunny", "tender", "tidy", "timid", "tranquil", "upright", "vivid", "wintry",
)  # fmt: skip
NOUNS = (
    "acorn", "almond", "anvil", "apron", "attic", "badger", "bakery", "barrel", "basket", "beacon", "bellows",
    "blanket", "boulder", "bucket", "button", "cabin", "cactus", "camera", "canyon", "carpet", "castle", "cellar",
    "chimney", "cistern", "clarinet", "clover", "compass", "cottage", "cradle", "cricket", "cupboard", "curtain",
    "dagger", "desert", "dolphin", "donkey", "drawer", "engine", "feather", "fiddle", "finch", "forest", "fountain",
    "furnace", "gallery", "goblet", "granite", "hammer", "hammock", "harvest", "hedgehog", "helmet", "hinge", "iceberg",
    "jacket", "jigsaw", "kitchen", "ladder", "lagoon", "lobster", "locket", "magnet", "mallet", "marble", "mirror",
    "mitten", "monsoon", "mountain", "needle", "nutmeg", "oasis", "octopus", "oyster", "paddle", "parcel", "parsley",
    "pasture", "pelican", "pepper", "piano", "pillow", "pistachio", "plateau", "pulley", "puzzle", "rafter", "ribbon",
    "river", "rocket", "scarf", "shovel", "sparrow", "spindle", "stable", "teapot", "tunnel", "turnip", "valley",
    "walnut", "window",
)  # fmt: skip

PAIRS = len(ADJECTIVES) * len(NOUNS)
"""Different keys that there are."""


def pair(number: int) -> str:
    """Key `number` of PAIRS: an adjective and a noun."""
    adjective, noun = divmod(number, len(NOUNS))
    return f"{ADJECTIVES[adjective]}-{NOUNS[noun]}"


def words(rng: random.Random, count: int) -> list[str]:
    """So many two-word keys, no two alike."""
    return [pair(number) for number in rng.sample(range(PAIRS), count)]


def numbers(rng: random.Random, count: int) -> list[str]:
    """So many numbers of seven digits, no two alike."""
    return [str(number) for number in rng.sample(range(1_000_000, 10_000_000), count)]


def uuids(rng: random.Random, count: int) -> list[str]:
    """So many random UUIDs of version 4."""
    return [str(uuid.UUID(int=rng.getrandbits(128), version=4)) for _ in range(count)]


KINDS = {"words": words, "numbers": numbers, "uuids": uuids}
"""By the name that RULER's sentences call them."""
