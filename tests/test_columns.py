"""`utils.columns`: the one place for names, units and meanings of columns."""

import subprocess
import sys

from utils import columns, paths, results, schema


def test_the_readme_has_the_table_of_all_columns():
    readme = (paths.RESULTS / "README.md").read_text(encoding="utf-8")
    assert readme.partition("## Columns of results.csv")[2].endswith(f"\n\n{columns.markdown()}\n")


def test_the_module_prints_the_table_and_needs_only_the_standard_library():
    command = [sys.executable, "-I", "-S", "-c"]
    code = (
        f"import runpy, sys; sys.path.insert(0, {str(paths.ROOT)!r}); "
        "runpy.run_module('utils.columns', run_name='__main__')"
    )
    done = subprocess.run([*command, code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{columns.markdown()}\n", "")


def test_the_table_names_each_column_once_in_the_order_of_results_csv():
    rows = columns.markdown().splitlines()[2:]
    names = [name.strip("` ") for row in rows for name in row.split("|")[1].split(",")]
    assert names == list(results.COLUMNS) and len(set(names)) == len(names)


def test_names_that_belong_together_share_a_row_and_no_meaning_breaks_the_table():
    rows = columns.markdown().splitlines()
    assert any(row.startswith("| `accuracy_ci_low`, `accuracy_ci_high` | share | ") for row in rows)
    assert {row.count("|") for row in rows} == {4}
    assert all(column.meaning and "\n" not in column.meaning for column in columns.COLUMNS)


def test_every_column_has_the_rule_of_its_section():
    for column in columns.COLUMNS:
        assert schema.SECTIONS[column.section][column.name] == column.rule
    assert [name for _, names in results.SECTIONS for name in names] == list(results.COLUMNS)
