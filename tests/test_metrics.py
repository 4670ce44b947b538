"""Metrics against closed forms and brute force."""

import math

import numpy as np

from evaluation import metrics


def arrays(V=2, S=4, T=3, seed=0):
    rng = np.random.default_rng(seed)
    return rng.random((V, S, T, 4, 4, 3)), rng.random((V, T, 4, 4, 3))


def test_mse_and_psnr():
    samples, truth = arrays()
    assert np.allclose(
        metrics.mse(samples, truth),
        [
            [[np.mean((s[t] - y[t]) ** 2) for t in range(3)] for s in x]
            for x, y in zip(samples, truth)
        ],
    )
    off = np.full((1, 2, 1, 4, 4, 3), 0.5)
    off[0, 1] = 0.6
    psnr = metrics.psnr(off, np.full((1, 1, 4, 4, 3), 0.4))
    assert np.allclose(psnr[0, :, 0], [-10 * math.log10(0.01), -10 * math.log10(0.04)])
    assert np.allclose(metrics.psnr(off[:, :1], off[:, 0]), 100)


def test_crps_against_brute_force():
    samples, truth = arrays(S=5)
    for v in range(2):
        for t in range(3):
            x, y = samples[v, :, t], truth[v, t]
            pairs = np.mean(
                [np.abs(x[i] - x[j]).mean() for i in range(5) for j in range(5) if i != j]
            )
            assert np.isclose(metrics.crps(samples, truth)[v, t], np.abs(x - y).mean() - pairs / 2)


def test_crps_of_one_sample_is_the_absolute_error():
    samples, truth = arrays(S=1)
    assert np.allclose(
        metrics.crps(samples, truth), np.abs(samples[:, 0] - truth).mean((-3, -2, -1))
    )


def test_crps_of_a_normal_forecast_is_the_closed_form():
    """For N(0, 1) and y = 0: E|X| - E|X - X'| / 2 = sqrt(2/pi) - 1/sqrt(pi), whatever the number of
    samples.
    """
    rng = np.random.default_rng(0)
    for S in (2, 6):
        samples = rng.standard_normal((1, S, 1, 400, 400, 3))
        value = metrics.crps(samples, np.zeros((1, 1, 400, 400, 3)))[0, 0]
        assert abs(value - (math.sqrt(2 / math.pi) - 1 / math.sqrt(math.pi))) < 3e-3


def test_summary_over_videos():
    summary = metrics.summarize(np.array([[1.0, 3.0], [5.0, 7.0]]))
    assert summary == {"mean": 4.0, "se": np.std([2, 6], ddof=1) / math.sqrt(2)}


def test_ssim_against_its_definition():
    """The window's moments summed by hand, edges reflected."""
    rng = np.random.default_rng(0)
    x, y = (rng.random((1, 1, 1, 16, 16, 3)).astype(np.float32) for _ in range(2))
    padded = [
        np.pad(z[0, 0, 0], ((5, 5), (5, 5), (0, 0)), "reflect").astype(np.float64) for z in (x, y)
    ]
    offset = np.arange(11) - 5
    line = np.exp(-(offset**2) / (2 * 1.5**2))
    window = np.outer(line, line) / line.sum() ** 2
    found = []
    for i in range(16):
        for j in range(16):
            a, b = (z[i : i + 11, j : j + 11] for z in padded)
            moment = lambda z: np.einsum("ij,ijc->c", window, z)  # noqa: B023, E731
            ma, mb = moment(a), moment(b)
            va, vb, cov = moment(a * a) - ma**2, moment(b * b) - mb**2, moment(a * b) - ma * mb
            found.append(
                (2 * ma * mb + 1e-4)
                * (2 * cov + 9e-4)
                / ((ma**2 + mb**2 + 1e-4) * (va + vb + 9e-4))
            )
    assert abs(metrics.ssim(x, y[:, 0])[0, 0, 0] - np.mean(found)) < 1e-5
    assert np.allclose(
        metrics.ssim(np.concatenate([x, y], 1), x[:, 0])[0, :, 0] > 0.99, [True, False]
    )


def test_rules():
    values = np.array([[[1.0, 2.0], [5.0, 0.0], [2.0, 2.0]]])
    assert metrics.reduce_samples(values, "mean", True).tolist() == [[8 / 3, 4 / 3]]
    assert metrics.reduce_samples(values, "first", True).tolist() == [[1.0, 2.0]]
    assert metrics.reduce_samples(values, "best", True).tolist() == [[5.0, 0.0]]
    assert metrics.reduce_samples(values, "best", False).tolist() == [[1.0, 2.0]]


def test_energy_score_against_brute_force_and_closed_form():
    samples, truth = arrays(S=5)
    norm = lambda z: np.sqrt((z**2).mean())  # noqa: E731
    for v in range(2):
        for t in range(3):
            x, y = samples[v, :, t], truth[v, t]
            pairs = np.mean([norm(x[i] - x[j]) for i in range(5) for j in range(5) if i != j])
            assert np.isclose(
                metrics.energy(samples, truth)[v, t], np.mean([norm(z - y) for z in x]) - pairs / 2
            )
    one = np.random.default_rng(0).standard_normal(
        (20000, 3, 1, 1, 1, 1)
    )  # in one dimension it is the CRPS
    value = metrics.energy(one, np.zeros((20000, 1, 1, 1, 1))).mean()
    assert abs(value - (math.sqrt(2 / math.pi) - 1 / math.sqrt(math.pi))) < 0.015


def test_spread_skill_and_ranks_of_a_perfect_and_of_a_narrow_ensemble():
    rng = np.random.default_rng(0)
    truth = rng.standard_normal((50, 2, 16, 16, 3))
    for width, ratio in ((1.0, 1.0), (0.5, 0.5 * math.sqrt(1.25 / (1 + 0.25 / 4)))):
        samples = width * rng.standard_normal((50, 4, 2, 16, 16, 3))
        found = metrics.spread_skill(metrics.spread(samples), metrics.skill(samples, truth))
        assert abs(found - ratio) < 0.02
        counts = metrics.rank_histogram(samples, truth, rng)
        assert counts.sum() == truth.size and len(counts) == 5
        flat = counts / counts.mean()
        assert np.allclose(flat, 1, atol=0.04) if width == 1 else (flat[[0, 4]] > 1.3).all()


def test_ranks_break_ties_evenly():
    counts = metrics.rank_histogram(
        np.zeros((1, 3, 1, 200, 200, 3)), np.zeros((1, 1, 200, 200, 3)), np.random.default_rng(0)
    )
    assert np.allclose(counts / counts.mean(), 1, atol=0.03)


def test_min_ade():
    truth = np.zeros((1, 2, 2, 2))
    samples = np.zeros((1, 3, 2, 2, 2))
    samples[0, 0, ..., 0] = 3
    samples[0, 1, 0, 0] = (3, 4)  # one object in one of two frames is off by 5
    samples[0, 2] = 9
    assert metrics.min_ade(samples, truth).tolist() == [5 / 4]


def gaussian(rng, n, d, rank=None):
    root = rng.standard_normal((d, rank or d))
    return rng.standard_normal((n, rank or d)) @ root.T + rng.standard_normal(d)


def test_frechet_distance_against_closed_forms():
    rng = np.random.default_rng(0)
    a, b = (
        rng.random(6) + 0.1 for _ in range(2)
    )  # of commuting covariances it is a sum over eigenvalues
    q = np.linalg.qr(rng.standard_normal((6, 6)))[0]
    m = rng.standard_normal(6)
    found = metrics.frechet_distance(m, q * a @ q.T, np.zeros(6), q * b @ q.T)
    assert np.isclose(found, m @ m + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum())
    c, d = (np.cov(gaussian(rng, 50, 6), rowvar=False) for _ in range(2))
    values = np.linalg.eigvals(c @ d)  # its definition, where nothing is singular
    assert np.isclose(
        metrics.frechet_distance(m, c, m, d), np.trace(c + d) - 2 * np.sqrt(values).sum().real
    )
    assert np.isclose(
        metrics.frechet_distance(m, c, 0 * m, d), metrics.frechet_distance(0 * m, d, m, c)
    )
    singular = np.ones((6, 6))
    assert abs(metrics.frechet_distance(m, singular, m, singular)) < 1e-12


def test_fvd_is_the_frechet_distance_of_the_features_moments():
    rng = np.random.default_rng(0)
    for n, m, d in (
        (200, 150, 20),
        (15, 30, 40),
        (12, 200, 40),
    ):  # more videos than features, fewer, one of each
        a, b = gaussian(rng, n, d), gaussian(rng, m, d)
        wanted = metrics.frechet_distance(
            a.mean(0), np.cov(a, rowvar=False), b.mean(0), np.cov(b, rowvar=False)
        )
        assert np.isclose(metrics.fvd(a, b), wanted) and np.isclose(
            metrics.fvd(a, b), metrics.fvd(b, a)
        )
        assert abs(metrics.fvd(a, a)) < 1e-8 * (a**2).sum()
    big = 1e4 * gaussian(rng, 64, 400, rank=3).astype(np.float32)
    assert abs(metrics.fvd(big, big[::-1])) < 1e-3 * metrics.fvd(big, 0 * big) * 1e-6


def test_kvd_is_unbiased_and_grows_with_the_distance():
    rng = np.random.default_rng(0)
    draws = [
        metrics.kvd(rng.standard_normal((8, 5)), rng.standard_normal((6, 5))) for _ in range(3000)
    ]
    assert abs(np.mean(draws)) < 4 * np.std(draws) / math.sqrt(len(draws))
    a = rng.standard_normal((200, 5))
    near, far = (metrics.kvd(a, rng.standard_normal((200, 5)) + shift) for shift in (0.3, 1.0))
    assert 0.1 < near < far / 4
    # brute force, over distinct pairs
    a, b = rng.standard_normal((4, 3)), rng.standard_normal((5, 3))
    k = lambda x, y: (x @ y / 3 + 1) ** 3  # noqa: E731
    within = [
        np.mean([k(s[i], s[j]) for i in range(len(s)) for j in range(len(s)) if i != j])
        for s in (a, b)
    ]
    assert np.isclose(metrics.kvd(a, b), sum(within) - 2 * np.mean([k(x, y) for x in a for y in b]))


def test_transition_kl():
    true = np.array([[0, 50, 50], [100, 0, 0], [100, 0, 0]])
    assert metrics.transition_kl(true, 1000 * true) < 1e-4
    uniform = np.array([[0, 5000, 5000], [5000, 0, 5000], [5000, 5000, 0]])
    assert np.isclose(metrics.transition_kl(true, uniform), 2 / 3 * math.log(2), atol=1e-3)
    assert metrics.transition_kl(true, np.zeros((3, 3))) == metrics.transition_kl(true, uniform)
    assert math.isnan(metrics.transition_kl(np.zeros((3, 3)), uniform))


def test_bootstrap_gives_the_standard_error_of_a_mean():
    rng = np.random.default_rng(0)
    values = rng.standard_normal(400)
    se = metrics.bootstrap(lambda i: values[i].mean(), 400, rng, 2000)
    assert abs(se / (values.std(ddof=1) / 20) - 1) < 0.1
    assert metrics.bootstrap(lambda i: values[i].mean(), 1, rng) == 0.0


def test_kernel_sums_give_kvd_of_any_of_the_videos():
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((6, 3, 5)), rng.standard_normal((6, 2, 5))
    sums, i = metrics.KernelSums(a, b), np.array([0, 2, 5])
    assert np.isclose(
        metrics.kvd_from_sums(sums, i, i), metrics.kvd(a[i].reshape(-1, 5), b[i].reshape(-1, 5))
    )


def test_jackknife_of_a_mean_is_its_standard_error_and_of_fvd_about_its_spread():
    rng = np.random.default_rng(0)
    values = rng.standard_normal(50)
    assert np.isclose(
        metrics.jackknife(lambda i: values[i].mean(), 50), values.std(ddof=1) / math.sqrt(50)
    )
    draws = [
        (rng.standard_normal((40, 20)), rng.standard_normal((40, 20)) + 0.3) for _ in range(60)
    ]
    spread = np.std([metrics.fvd(a, b) for a, b in draws])
    found = np.mean(
        [metrics.jackknife(lambda i, a=a, b=b: metrics.fvd(a[i], b[i]), 40) for a, b in draws[:8]]
    )
    assert 0.7 < found / spread < 1.8
