"""Tables in Markdown."""

from genkit.core.markdown import markdown_table


def test_cells_stay_in_their_column_and_numbers_are_to_the_right():
    table = markdown_table(("name", "value"), [("a|b\nc", "1")], numbers=1)
    assert table == "| name | value |\n| --- | ---: |\n| a\\|b c | 1 |"
