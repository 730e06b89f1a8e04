import numpy as np

from foreroute.engine.routing.hashing import hash64, normal, uniform

# First outputs of the published splitmix64 generator for two seeds.
SEED_1234567 = [
    6457827717110365317,
    3203168211198807973,
    9817491932198370423,
    4593380528125082431,
    16408922859458223821,
]
SEED_0 = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
GAMMA = 0x9E3779B97F4A7C15


def test_hash_of_successive_states_is_the_published_sequence():
    for seed, outputs in ((1234567, SEED_1234567), (0, SEED_0)):
        assert [int(hash64(seed + i * GAMMA)) for i in range(len(outputs))] == outputs


def test_arrays_broadcast_and_equal_the_hashes_of_their_numbers():
    rows, choices = np.arange(5)[:, None], np.arange(3)
    table = hash64(7, rows, choices)
    assert table.shape == (5, 3)
    assert all(table[r, c] == hash64(7, r, c) for r in range(5) for c in range(3))


def test_order_and_number_of_parts_matter():
    values = {int(hash64(*parts)) for parts in ((1, 2), (2, 1), (1,), (1, 0), (0, 1), (1, 2, 0), ())}
    assert len(values) == 7


def test_python_ints_and_int64_arrays_agree_modulo_two_to_the_64():
    assert hash64(-1) == hash64(2**64 - 1) == hash64(np.array(-1))


def test_uniform_uses_the_upper_53_bits():
    hashes = np.array([0, 2**63, 2**64 - 1], np.uint64)
    assert uniform(hashes).tolist() == [0.0, 0.5, 1 - 2.0**-53]


def test_moments_of_uniform_and_normal():
    hashes = hash64(3, np.arange(200_000))
    u, z = uniform(hashes), normal(hashes)
    assert np.isfinite(z).all()
    assert abs(u.mean() - 0.5) < 0.003 and abs(u.var() - 1 / 12) < 0.001
    assert abs(z.mean()) < 0.01 and abs(z.std() - 1) < 0.01
    assert abs((z**4).mean() - 3) < 0.1
    assert abs((np.abs(z) < 1).mean() - 0.6827) < 0.005
    assert abs(np.corrcoef(z[:-1], z[1:])[0, 1]) < 0.01
