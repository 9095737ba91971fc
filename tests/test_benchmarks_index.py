"""What the benchmark of an index says on paper."""

from benchmarks import index


def test_a_million_reviews_cost_their_tokens_and_two_kilobytes_each():
    row = index.on_paper(seconds_a_token=1e-3, mean_tokens=200, reviews=1_000_000)
    assert row == ["1,000,000", "2,048 MB", "55.6 h"]
