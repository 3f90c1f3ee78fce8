"The order: exactly once an epoch, the same for any ranks, and as well mixed as a real permutation."
import math
import numpy as np, pytest
from clipa_nb.core import UserError
from clipa_nb.data import MixedOrder, Mixture, Order, deal_of, lanes_of, order_of, perm, positions, weighted, whole_shares
from clipa_nb.engine.index import Blocks
from clipa_nb.engine.pairs import Source


def drawn(seed):
    "Random sizes; small ones and edges are not rare."
    g = np.random.default_rng(seed)
    lanes, k = 2**int(g.integers(0, 8)), int(g.choice([1, 1, 2, 3, 4, 7, 16, 128]))
    N = int(g.choice([g.integers(1, 40), g.integers(40, 3000), k * g.integers(1, 40), lanes * k]))
    return g, N, lanes, k, int(g.choice([0, 1, 2, 4, 8])), lanes * int(g.choice([1, 2, 3, 5]))


# ---- a permutation without an array ----

@pytest.mark.parametrize('n', [1, 2, 3, 4, 5, 7, 12, 13, 100, 101, 1000, 4097])
def test_perm_is_a_permutation(n):
    for key in range(5): assert np.array_equal(np.sort(perm(np.arange(n), n, key)), np.arange(n))
    assert n < 4 or len({tuple(perm(np.arange(n), n, key)) for key in range(50)}) > 5


def test_perm_takes_places_sizes_and_keys_one_by_one():
    n, key = np.array([5, 5, 9, 9]), np.array([1, 1, 2, 3], np.uint64)
    assert perm([0, 4, 8, 8], n, key).tolist() == [int(perm(i, m, int(k))[0]) for i, m, k in zip([0, 4, 8, 8], n, key)]
    assert perm(3, 10**12, 5)[0] < 10**12 and perm(3, 10**12, 5).dtype == np.int64


def test_perm_of_twelve_sends_everybody_everywhere():
    "Each place goes to each of twelve equally often, and pairs of neighbours go to all pairs: chi-square, 99.99 %."
    seen = perm(np.tile(np.arange(12), 12_000), 12, np.repeat(np.arange(12_000), 12)).reshape(-1, 12)
    counts = np.stack([np.bincount(seen[:, i], minlength=12) for i in range(12)])
    assert ((counts - 1000)**2 / 1000).sum() < 190 # 121 degrees of freedom
    pairs = np.bincount(seen[:, 0] * 12 + seen[:, 1], minlength=144)[~np.eye(12, dtype=bool).ravel()]
    assert ((pairs - 12_000 / 132)**2 / (12_000 / 132)).sum() < 200 # 131 degrees of freedom


# ---- exactly once ----

@pytest.mark.parametrize('seed', range(60))
def test_every_epoch_has_every_sample_once(seed):
    g, N, lanes, k, window, _ = drawn(seed)
    order = Order(N, seed, lanes, k, window)
    for epoch in (0, 1, 7): assert np.array_equal(np.sort(order[np.arange(epoch * N, (epoch + 1) * N)]), np.arange(N)), (N, lanes, k, window)


@pytest.mark.parametrize('seed', range(60))
def test_ranks_share_a_batch_and_batches_share_the_sequence(seed):
    "Any rank count that divides the batch: the same rows; any batch that the lanes divide: the same samples."
    g, N, lanes, k, window, B = drawn(seed)
    order, cursor = Order(N, seed, lanes, k, window), lanes * int(g.integers(0, 3 * N // lanes + 2))
    whole = order[positions(cursor, B, lanes)]
    assert np.array_equal(np.sort(positions(cursor, B, lanes)), cursor + np.arange(B))
    for size in (s for s in range(1, 9) if B % s == 0):
        parts = [order[positions(cursor, B, lanes, r, size)] for r in range(size)]
        assert len({len(p) for p in parts}) == 1 and np.array_equal(np.concatenate(parts), whole)
    other = lanes * int(g.integers(1, 4))
    steps = math.lcm(B, other)
    a, b = (np.concatenate([order[positions(cursor + s, x, lanes)] for s in range(0, steps, x)]) for x in (B, other))
    assert np.array_equal(np.sort(a), np.sort(b))


@pytest.mark.parametrize('seed', range(40))
def test_what_is_read_was_read_ahead(seed):
    "From any cursor: the blocks of a batch are among those asked for before, on each rank; and few are asked for twice."
    g = np.random.default_rng(seed)
    lanes, k, share = 2**int(g.integers(0, 5)), int(g.choice([3, 4, 7, 16])), int(g.integers(1, 6))
    N, B, window = int(g.integers(3 * lanes * k, 6000)), lanes * share, int(g.choice([0, 1, 2, 4, 8]))
    order, size = Order(N, seed, lanes, k, window), int(g.choice([s for s in range(1, 7) if B % s == 0]))
    rank, b, cursor = int(g.integers(size)), B // size, lanes * int(g.choice([0, g.integers(0, 2 * N // lanes), N // lanes - 2]))
    columns = cursor + np.arange(rank * b // share, -(-(rank + 1) * b // share))
    have = set(order.ahead(columns, columns, fill=True).tolist())
    for step in range(min(40, 2 * N // B + 1)):
        at = columns + step * B
        have |= set(order.ahead(at, at + B).tolist())
        p = positions(cursor + step * B, B, lanes, rank, size)
        block = order.places(p)[p % N < lanes * (N // lanes)] // k # leftovers and the short block are read as they come
        assert set(block[block < N // k].tolist()) <= have


def test_a_block_is_read_once_where_ranks_divide_the_lanes():
    N, lanes, k, window, B = 64 * 1000 + 17, 16, 64, 4, 256
    for size in (1, 4, 16):
        order, asked = Order(N, 3, lanes, k, window), 0
        for r in range(size):
            columns = np.arange(r * lanes // size, (r + 1) * lanes // size)
            asked += len(order.ahead(columns, columns, fill=True))
            asked += sum(len(order.ahead(columns + s * B, columns + (s + 1) * B)) for s in range(N // B))
        next_epoch = lanes * (window + 1) # its first windows are asked for in the last ones of this epoch
        assert 0.98 < (asked - next_epoch) / (N / k) < 1 + 1.1 * lanes / (N / k), 'a block may begin in one lane and end in another'


@pytest.mark.parametrize('seed', range(40))
def test_blocks_with_pooled_tails(seed):
    g = np.random.default_rng(seed)
    counts, k = g.integers(0, 20, int(g.integers(1, 12))), int(g.integers(1, 9))
    counts[g.integers(len(counts))] += 1
    blocks, start = Blocks(counts, k), np.concatenate([[0], np.cumsum(counts)])
    found = blocks.sample(np.arange(blocks.n))
    assert np.array_equal(np.sort(found), np.arange(counts.sum()))
    for b in range(len(blocks)):
        inside = set()
        for shard, block in blocks.pieces(b): inside |= set(range(start[shard] + block * k, min(start[shard] + (block + 1) * k, start[shard + 1])))
        assert set(found[b * k:(b + 1) * k].tolist()) <= inside


# ---- what cannot be shared ----

def test_batches_that_ranks_or_lanes_cannot_share():
    with pytest.raises(UserError, match='a batch of 4 cannot be shared by 3 ranks'): positions(0, 4, 1, 0, 3)
    with pytest.raises(UserError, match='does not fit the 8 lanes that the run was begun with'): positions(0, 12, 8)
    with pytest.raises(UserError, match='after 12 samples does not fit the 8 lanes'): positions(12, 16, 8)
    assert [lanes_of(x) for x in ([65536, 16384], [96], [7], [128, 48])] == [512, 32, 1, 16]


# ---- the shuffle, beside a true permutation ----

def statistics(x):
    "Serial correlation, distance of a visit from uniform (Kolmogorov–Smirnov of each tenth), share of neighbours that stay near."
    n = len(x)
    serial = np.corrcoef(x[:-1], x[1:])[0, 1]
    tenths = [np.abs(np.sort(part) / n - np.arange(len(part)) / len(part)).max() * len(part)**0.5 for part in np.array_split(x, 10)]
    when = np.empty(n, np.int64)
    when[x] = np.arange(n)
    return serial, max(tenths), when


@pytest.mark.parametrize('deal', [dict(lanes=1), dict(lanes=64), dict(lanes=64, block=32, window=0), dict(lanes=64, block=32, window=8), dict(lanes=16, block=32, window=16)])
def test_shuffled_as_well_as_a_true_permutation(deal):
    "100,000 samples: serial correlation, uniform tenths of an epoch; second epochs, where windows do not grow."
    N = 100_000
    ours, true = Order(N, 5, **deal), np.random.default_rng(0)
    rows = [statistics(ours[np.arange(e * N, (e + 1) * N)])[:2] for e in range(1, 5)]
    fair = [statistics(true.permutation(N))[:2] for _ in range(4)]
    assert max(abs(s) for s, _ in rows) < 4 / N**0.5 and max(abs(s) for s, _ in fair) < 4 / N**0.5
    few = 1 if deal.get('block', 1) == 1 else (deal['block'] * max(1, 10 / max(1, deal['window'] or 10)))**0.5 # a tenth sees whole blocks
    assert max(k for _, k in rows) < 2.2 * few and max(k for _, k in fair) < 2.2
    assert abs(np.corrcoef(np.arange(N), ours[np.arange(N, 2 * N)])[0, 1]) < 4 / N**0.5 * few


def test_neighbours_of_a_block_are_spread_over_their_window():
    "Within a lane's window the distance between neighbours is that of random pairs: a third of the window."
    N, lanes, k, window = 64 * 32 * 40, 64, 32, 8
    order = Order(N, 1, lanes, k, window)
    when = statistics(order[np.arange(N, 2 * N)])[2]
    apart = np.abs(np.diff(when.reshape(-1, k), axis=1))
    assert 0.9 < np.median(apart) / ((1 - 0.5**0.5) * window * k * lanes) < 1.1
    assert (apart < lanes).mean() < 2 / (window * k) * 1.5, 'neighbours seldom meet in one round of the lanes'


def test_epochs_and_seeds_differ():
    order = Order(1000, 0, 8, 4, 2)
    a, b, c = order[np.arange(1000)], order[np.arange(1000, 2000)], Order(1000, 1, 8, 4, 2)[np.arange(1000)]
    assert (a == b).mean() < 0.02 and (a == c).mean() < 0.02 and order[5] == a[5] and type(order[5]) is int


def test_a_sequential_source_comes_as_it_lies():
    assert Order(5, 0, sequential=True)[np.arange(12)].tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0, 1]


def test_windows_grow_in_the_first_epoch():
    order = Order(8 * 4 * 100, 0, 8, 4, 16)
    first, width = order.windows(np.arange(0, 200, 4), 0)
    assert width[:9].tolist() == [4, 4, 8, 8, 16, 16, 16, 16, 32] and first[20] == 64 and order.windows(np.arange(4), 1)[1].tolist() == [64] * 4


# ---- mixtures ----

class Numbers(Source):
    def __init__(self, n, name='x'): self.n, self.place = n, name
    def read(self, i): return dict(image=b'', text=f'{self.place} {i}', json={'label': i}, key=str(i))


@pytest.mark.parametrize('weights, lanes', [((3, 7), 8), (('0.3', '0.7'), 1), ((1, 1, 2), 16), (('0.123', '0.877'), 4)])
def test_shares_are_exact_in_every_lane_and_each_source_counts_its_epochs(weights, lanes):
    sources = [Numbers(n) for n in (50, 170, 31)[:len(weights)]]
    mix = Mixture(sources, weights)
    order = order_of(mix, 0, deal_of(mix, lanes))
    period, shares = sum(mix.shares), mix.shares
    ids = order[np.arange(period * lanes * 3)]
    owner = np.searchsorted(mix.start, ids, side='right') - 1
    for lane in range(lanes):
        for part in np.split(owner[lane::lanes], 3): assert np.bincount(part, minlength=len(shares)).tolist() == shares
    for s, source in enumerate(sources): # whole epochs of a source hold each sample equally often, up to the edges of the lanes
        own = ids[owner == s] - mix.start[s]
        seen = np.bincount(own, minlength=len(source))
        assert seen.max() - seen.min() <= (1 if lanes == 1 else 2)


def test_a_batch_of_many_lanes_is_mixed_too():
    mix = Mixture([Numbers(1000), Numbers(1000)], [1, 9])
    order = order_of(mix, 0, deal_of(mix, 64))
    shares = [(order[positions(s * 64, 64, 64)] < 1000).sum() for s in range(50)]
    assert min(shares) >= 5 and max(shares) <= 8


def test_mixtures_split_over_ranks_and_start_anywhere():
    mix = Mixture([Numbers(33), Numbers(70)], ['0.4', '0.6'])
    order = order_of(mix, 2, deal_of(mix, 4))
    whole = order[positions(400, 12, 4)]
    assert np.array_equal(np.concatenate([order[positions(400, 12, 4, r, 3)] for r in range(3)]), whole) and isinstance(order, MixedOrder)
    assert mix.read(40)['text'] == 'x 7' and mix.where(40) == ('Numbers', '7') and mix.fields == ('image', 'text', 'label')


def test_weights():
    assert whole_shares(['0.3', '0.7']) == [3, 7] and whole_shares([2, 2]) == [1, 1]
    for wrong in (['0', '1'], [-1, 2], ['0.12345', '0.7']):
        with pytest.raises(UserError): whole_shares(wrong)
    assert weighted('a@0.3::b@0.7') == [('a', '0.3'), ('b', '0.7')] and weighted('a::b') == [] and weighted('user@host/data') == []
    with pytest.raises(UserError, match='give every part a weight'): weighted('a@0.3::b')


def test_how_a_source_is_dealt():
    class Large(Numbers):
        bytes, blocks = 10**12, Blocks([31_000] * 500)
    assert deal_of(Large(15_500_000), 512, 1e11) == dict(lanes=512, block=128, window=8)
    assert deal_of(Large(15_500_000), 512, 1e9)['window'] == 1 and deal_of(Large(15_500_000), 1, 9e11)['window'] % 2 == 0
    assert deal_of(Large(15_500_000), 512, 2e12) == dict(lanes=512, block=1, window=0) == dict(deal_of(Numbers(10), 512))
    stream = Numbers(10)
    stream.sequential = True
    assert deal_of(stream, 64) == dict(lanes=1, sequential=True)
