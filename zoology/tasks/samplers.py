"""Reproducible random draws: the one set of samplers every task is built from.

The bytes of a dataset are a contract, so nothing here may change between machines or versions of NumPy:

- Words come from `BitGenerator.random_raw` of Philox-4x64-10, whose stream NumPy guarantees (NEP 19 leaves
  the methods of `Generator` free to change). The 128-bit key is a hash of what is being generated.
- Each draw starts at a counter of its own, (0, round, index of the draw, index of the chunk): chunks can be
  made in any order and by any number of threads, and a longer dataset begins with the shorter one.
- Everything after the words is integer arithmetic, or single IEEE-754 additions, products and quotients,
  which round the same everywhere. `np.log` and `**` do not: logarithms are summed here, powers are taken
  in `decimal`.
"""

import hashlib
import json
from decimal import Context, Decimal
from functools import lru_cache

import numpy as np

STREAM_FORMAT = 1
"""Raised when a sampler changes its bytes; part of every stream key and so of every dataset."""

_WORD = 1 << 32


def stream_key(*parts) -> bytes:
    """16 bytes that identify a stream: a hash of JSON-serialisable `parts`."""
    text = json.dumps([STREAM_FORMAT, *parts], sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


class Stream:
    """The random draws of one chunk of examples, in the order in which they are asked for.

    Every method draws for `n` examples and returns an array whose first axis is `n`; the first rows do not
    depend on how many rows there are.
    """

    def __init__(self, key: bytes, chunk: int = 0):
        self._key = np.frombuffer(key, dtype="<u8").astype(np.uint64)
        self._chunk = chunk
        self._draw = 0

    def words(self, n: int, *shape: int) -> np.ndarray:
        """Uniform 32-bit words, [n, *shape] uint32."""
        self._draw += 1
        self._round = 0
        return self._block(n, *shape)

    def _block(self, n: int, *shape: int) -> np.ndarray:
        """The words of the current round of the current draw. Redrawing is a matter of rounds, not of draws:
        the draws that follow must not depend on how often some row had to be redrawn."""
        counter = np.array([0, self._round, self._draw, self._chunk], dtype=np.uint64)
        count = n * int(np.prod(shape, dtype=np.int64))
        raw = np.random.Philox(counter=counter, key=self._key).random_raw((count + 1) // 2)
        return raw.astype("<u8", copy=False).view("<u4")[:count].reshape(n, *shape)

    def integers(self, low: int, high: int, n: int, *shape: int) -> np.ndarray:
        """Uniform integers in [low, high), [n, *shape] uint32 (relative bias under (high - low) / 2^32).

        Raises ValueError unless 0 <= low < high <= 2^32.
        """
        if not 0 <= low < high <= _WORD:
            raise ValueError(f"low={low}, high={high}: allowed are 0 <= low < high <= 2^32")
        return _scale(self.words(n, *shape), high - low) + np.uint32(low)

    def bernoulli(self, probability: float, n: int, *shape: int) -> np.ndarray:
        """True with the given probability (to 2^-32), [n, *shape] bool. Raises ValueError unless it is in [0, 1]."""
        if not 0 <= probability <= 1:
            raise ValueError(f"probability={probability}: must be in [0, 1]")
        return self.words(n, *shape).astype(np.uint64) < np.uint64(int(Decimal(probability) * _WORD))

    def permutation(self, size: int, n: int, k: int | None = None) -> np.ndarray:
        """The first k (default: all) of a uniform permutation of range(size), [n, k] int64; ValueError if k > size."""
        k = _at_most(size, size if k is None else k)
        keys = self.words(n, size).astype(np.uint64) << np.uint64(32)
        return _order(keys, k)

    def distinct(self, low: int, high: int, n: int, k: int) -> np.ndarray:
        """k different integers of [low, high) in random order, [n, k] int64: drawn without replacement.

        Duplicates are drawn again until none is left. Only equality decides what is drawn again, so the
        outcome is symmetric in the integers: every ordered choice of k of them is equally likely. Raises ValueError
        for a k above their number.
        """
        size = high - low
        k = _at_most(size, k)
        if 4 * k > size:  # redrawing would take long
            return self.permutation(size, n, k) + low
        out = _scale(self.words(n, k), size)
        rows = np.arange(n)
        while True:
            duplicate_rows, columns = _duplicates(out[rows], size)
            if len(duplicate_rows) == 0:
                return out.astype(np.int64) + low
            self._round += 1
            duplicate_rows = rows[duplicate_rows]
            out[duplicate_rows, columns] = _scale(self._block(n, k)[duplicate_rows, columns], size)
            rows = np.unique(duplicate_rows)

    def below(self, size: np.ndarray) -> np.ndarray:
        """Uniform integers in [0, size) for each entry of `size` [n], [n] int64."""
        return (self.words(len(size)).astype(np.int64) * size) >> 32

    def pick(self, mask: np.ndarray) -> np.ndarray:
        """The column of a True entry of each row of `mask` [n, k], each as likely, [n] int64; ValueError if none."""
        if len(empty := np.flatnonzero(~mask.any(1))):
            raise ValueError(f"mask: row {empty[0]} of {len(mask)} has no True entry to pick")
        return np.where(mask, self.words(*mask.shape).astype(np.int64), _WORD).argmin(1)

    def race(self, handicaps: np.ndarray, n: int, k: int) -> np.ndarray:
        """k different indices of `handicaps`, drawn in turn with weights 1 / handicap, [n, k] int64.

        The order in which exponential clocks of those rates ring is the order of successive weighted draws
        without replacement (Plackett-Luce). Raises ValueError for a k above their number.
        """
        size = len(handicaps)
        k = _at_most(size, k)
        times = _exponential(self.words(n, size)) * handicaps
        return _order(times.view(np.uint64), k)  # positive floats sort like their bits


def _at_most(size: int, k: int) -> int:
    if not 0 <= k <= size:
        raise ValueError(f"k={k} without replacement out of {size}: must be 0 to {size}")
    return k


def first_occurrence(codes: np.ndarray) -> np.ndarray:
    """The column of the first entry of each row of `codes` [n, k] that equals the entry itself, [n, k] int64."""
    order = np.argsort(codes, axis=1, kind="stable")
    ordered = np.take_along_axis(codes, order, axis=1)
    starts = np.zeros_like(order)
    starts[:, 1:] = np.where(ordered[:, 1:] != ordered[:, :-1], np.arange(1, codes.shape[1]), 0)
    first = np.empty_like(order)
    heads = np.take_along_axis(order, np.maximum.accumulate(starts, axis=1), axis=1)
    np.put_along_axis(first, order, heads, axis=1)
    return first


@lru_cache(maxsize=256)
def power_law_handicaps(size: int, a: float) -> np.ndarray:
    """Reciprocal weights i^(1-a), i = 1..size, of the power law i^(a-1), correctly rounded to float64."""
    context = Context(prec=30)
    exponent = context.subtract(Decimal(1), Decimal(a))
    values = np.array([float(context.power(Decimal(i), exponent)) for i in range(1, size + 1)])
    values.setflags(write=False)
    return values


def _scale(words: np.ndarray, size: int) -> np.ndarray:
    """Uniform integers floor(word * size / 2^32) of [0, size), uint32, for 1 <= size <= 2^32."""
    if size & (size - 1) == 0:  # the same bits by a shift
        shift = 33 - size.bit_length()
        return words >> np.uint32(shift) if shift < 32 else np.zeros_like(words)
    return (np.multiply(words, np.uint64(size), dtype=np.uint64) >> np.uint64(32)).astype(np.uint32)


def _order(keys: np.ndarray, k: int) -> np.ndarray:
    """Column indices of the k smallest uint64 keys of each row, smallest first, [n, k] int64.

    The low bits of each key are replaced by its column: keys are then all different, so the result does not
    depend on the sorting algorithm.
    """
    size = keys.shape[1]
    mask = np.uint64((1 << max(size - 1, 0).bit_length()) - 1)
    tagged = (keys & ~mask) | np.arange(size, dtype=np.uint64)
    if 4 * k < size and k:
        tagged = np.partition(tagged, k - 1, axis=1)[:, :k]
    return (np.sort(tagged, axis=1)[:, :k] & mask).astype(np.int64)


def _duplicates(values: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns of the entries of `values` [n, k] < size that repeat an earlier one of their row."""
    bits = max(values.shape[1] - 1, 0).bit_length()
    wide = np.uint32 if size << bits <= _WORD else np.uint64
    tagged = (values.astype(wide) << wide(bits)) | np.arange(values.shape[1], dtype=wide)
    tagged.sort(axis=1)
    rows, places = np.nonzero((tagged[:, 1:] >> wide(bits)) == (tagged[:, :-1] >> wide(bits)))
    return rows, (tagged[rows, places + 1] & wide((1 << bits) - 1)).astype(np.int64)


_SQRT2_MANTISSA = 0x6A09E667F3BCC
_LN2 = 0.6931471805599453


def _exponential(words: np.ndarray) -> np.ndarray:
    """Standard exponential variates -ln((w + 1/2) / 2^32) of 32-bit words, float64 within 1e-9.

    ln is the series 2 artanh((m - 1)/(m + 1)) for m in [1/sqrt 2, sqrt 2), term by term in IEEE operations,
    because the last bit of `np.log` depends on the machine.
    """
    bits = (words + 0.5).view(np.uint64)
    mantissa = bits & np.uint64((1 << 52) - 1)
    large = mantissa >= np.uint64(_SQRT2_MANTISSA)
    exponent = (bits >> np.uint64(52)).astype(np.int64)
    exponent += large
    # The mantissa gets the exponent of [1/2, 1) when it is above sqrt 2, of [1, 2) otherwise.
    m = (mantissa | ((np.uint64(1023) - large) << np.uint64(52))).view(np.float64)
    s = m - 1.0
    m += 1.0
    s /= m
    square = s * s
    series = square * (2 / 11)
    for coefficient in (2 / 9, 2 / 7, 2 / 5, 2 / 3, 2.0):
        series += coefficient
        series *= s if coefficient == 2.0 else square
    return (1023 + 32 - exponent) * _LN2 - series
