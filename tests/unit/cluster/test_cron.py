"""Cron lines as KFP's scheduler reads them."""

import pytest
from spectraqlora.errors import InputError
from spectraqlora_pipelines.cluster.cron import argo_schedule, cron_line, interval_seconds


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ("0 3 * * *", "0 0 3 * * *"),
        ("*/15 9-17 1,15 jan-mar MON-FRI", "0 */15 9-17 1,15 jan-mar MON-FRI"),
        ("30 0 3 ? * 1", "30 0 3 ? * 1"),
        ("@weekly", "@weekly"),
    ],
)
def test_lines_get_the_seconds_that_kfp_expects(given: str, line: str) -> None:
    assert cron_line(given) == line


@pytest.mark.parametrize(
    "line",
    ["", "* * * *", "60 * * * *", "* 24 * * *", "* * 0 * *", "* * * 13 *", "* * * * 7", "*/0 * * * *",
     "5-3 * * * *", "a * * * *", "* * * * MON-", "1.5 * * * *", "@reboot", "0 0 0 0 0 0 0", "1/ * * * *"],
)  # fmt: skip
def test_lines_that_do_not_parse_are_refused(line: str) -> None:
    with pytest.raises(InputError) as caught:
        cron_line(line)
    assert "--cron" in str(caught.value) and "\n" not in str(caught.value)


def test_intervals() -> None:
    assert [interval_seconds(text) for text in ("90s", "30m", "6h", "1d")] == [90, 1800, 21600, 86400]
    for text in ("", "6", "0h", "30s", "1w", "-1h"):
        with pytest.raises(InputError):
            interval_seconds(text)


@pytest.mark.parametrize(
    ("cron", "every", "line"),
    [
        ("0 3 * * 1", "", "0 3 * * 1"),
        ("*/15  2-4 * * MON", "", "*/15 2-4 * * MON"),
        ("0 0 1 * *", "", "0 0 1 * *"),
        ("@daily", "", "@daily"),
        ("", "6h", "@every 6h"),
        ("", "90s", "@every 90s"),
        ("", "2d", "@every 48h"),
    ],
)
def test_argo_takes_a_crontab_line_as_it_is_and_an_interval_without_days(
    cron: str, every: str, line: str
) -> None:
    assert argo_schedule(cron, every) == line


@pytest.mark.parametrize(
    ("cron", "every", "expected"),
    [
        ("0 0 3 * * 1", "", "--cron: '0 0 3 * * 1': expected five fields without seconds"),
        ("61 3 * * 1", "", "--cron: '61 3 * * 1': expected 0-59 as minute, not '61'"),
        ("", "30s", "--every: '30s': expected a number and s, m, h or d, at least one minute"),
    ],
)
def test_argo_is_not_given_a_line_that_it_would_read_otherwise(cron: str, every: str, expected: str) -> None:
    with pytest.raises(InputError) as refused:
        argo_schedule(cron, every)
    assert str(refused.value).startswith(expected)
