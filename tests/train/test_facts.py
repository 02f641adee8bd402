"""The fact tables against second sources: scipy.constants, CLDR (babel), Kepler's third law, the filled shells."""

import csv
import unicodedata

import pytest

from qlab.train.corpus import FACTS, read_table

EURO_MEMBERS = {
    "Austria",
    "Belgium",
    "Estonia",
    "Finland",
    "France",
    "Germany",
    "Greece",
    "Ireland",
    "Italy",
    "Latvia",
    "Lithuania",
    "Luxembourg",
    "Malta",
    "Portugal",
    "Slovakia",
    "Slovenia",
    "Spain",
    "Andorra",
    "Monaco",
}


def plain(text):
    """Lower-case ASCII letters of a text."""
    folded = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().lower()
    return "".join(c for c in folded if c.isalpha())


@pytest.mark.parametrize("table", ["atlas", "constants", "countries", "elements", "planets", "units"])
def test_tables_are_whole_and_names_unique(table):
    with (FACTS / f"{table}.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file))
    assert {len(row) for row in rows} == {len(rows[0])}
    assert all(cell and cell == cell.strip() for row in rows for cell in row)
    assert len({row[0] for row in rows}) == len(rows)


def test_elements_are_in_order_and_periods_follow_the_filled_shells():
    rows = read_table("elements")
    assert [int(row["number"]) for row in rows] == list(range(1, 119))
    assert len({row["symbol"] for row in rows}) == 118
    noble = (2, 10, 18, 36, 54, 86, 118)
    assert [int(row["period"]) for row in rows] == [1 + sum(z > n for n in noble) for z in range(1, 119)]
    assert [rows[n - 1]["symbol"] for n in noble] == ["He", "Ne", "Ar", "Kr", "Xe", "Rn", "Og"]


def test_planets_obey_keplers_third_law():
    rows = read_table("planets")
    assert [int(row["order"]) for row in rows] == list(range(1, 9))
    for row in rows:
        assert float(row["period_years"]) ** 2 == pytest.approx(float(row["semi_major_axis_au"]) ** 3, rel=5e-3), row


def test_constants_agree_with_codata():
    constants = pytest.importorskip("scipy.constants")
    for row in read_table("constants"):
        value, unit, _ = constants.physical_constants[row["scipy_name"]]
        digits = len(row["value"].split("e")[0].replace(".", ""))
        assert float(row["value"]) == pytest.approx(float(f"{value:.{digits - 1}e}"), rel=1e-9), row
        assert row["unit"] == (unit.replace("Hz^-1", "s") or "1"), row


def test_unit_values_agree_with_scipy():
    constants = pytest.importorskip("scipy.constants")
    rows = {row["name"]: float(row["si_value"]) for row in read_table("units")}
    names = {
        "inch": "inch",
        "foot": "foot",
        "yard": "yard",
        "mile": "mile",
        "light year": "light_year",
        "hectare": "hectare",
        "litre": "liter",
        "minute": "minute",
        "hour": "hour",
        "day": "day",
        "pound": "pound",
        "tonne": "metric_ton",
        "bar": "bar",
        "calorie": "calorie",
        "electronvolt": "eV",
    }
    for name, scipy_name in names.items():
        assert rows.pop(name) == pytest.approx(getattr(constants, scipy_name), rel=1e-12), name
    assert set(rows.values()) == {1.0}  # the others are the coherent SI units


def test_units_of_one_quantity_have_one_dimension():
    dimension = {}
    for row in read_table("units"):
        assert dimension.setdefault(row["quantity"], row["si_unit"]) == row["si_unit"], row


def test_currencies_agree_with_cldr():
    numbers = pytest.importorskip("babel.numbers")
    core = pytest.importorskip("babel.core")
    territory = {plain(name): code for code, name in core.Locale("en").territories.items() if len(code) == 2}
    checked = 0
    for row in read_table("countries"):
        assert plain(row["currency"]) in plain(numbers.get_currency_name(row["currency_code"], locale="en")) or (
            row["currency"],
            row["currency_code"],
        ) in {("riyal", "QAR"), ("riyal", "SAR")}, row
        code = territory.get(plain(row["name"]))
        if code:
            assert row["currency_code"] in numbers.get_territory_currencies(code), row
            checked += 1
    assert checked > 120


def test_countries():
    rows = read_table("countries")
    assert {row["continent"] for row in rows} == {
        "Africa",
        "Asia",
        "Europe",
        "North America",
        "Oceania",
        "South America",
    }
    assert len({row["capital"] for row in rows}) == len(rows)
    assert {row["name"] for row in rows if row["currency"] == "euro"} == EURO_MEMBERS


def test_a_missing_table_is_named():
    with pytest.raises(FileNotFoundError, match=r"moons.csv is missing.*countries"):
        read_table("moons")
