"""What is known about images, as Arrow tables: columns of several tables as one, and conditions on them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from spn4cir.selection import Condition, Kind

if TYPE_CHECKING:
    import pyarrow

Mask: TypeAlias = "np.ndarray[Any, np.dtype[np.bool_]]"


def concatenate_tables(tables: Sequence[pyarrow.Table]) -> pyarrow.Table:
    """Tables below each other; a column that one lacks is empty there, and of different types becomes text."""
    import pyarrow as pa

    kinds: dict[str, set[Kind]] = {}
    for table in tables:
        for column in table.schema:
            if not pa.types.is_null(column.type):
                kinds.setdefault(column.name, set()).add(column_kind(column.type))
    types = {name: {table.schema.field(name).type for table in tables if name in table.column_names} for name in kinds}
    mixed = [name for name, found in kinds.items() if len(found) > 1]

    def fit(table: pyarrow.Table) -> pyarrow.Table:
        for place, name in enumerate(table.column_names):
            if name in mixed:
                table = table.set_column(place, name, table[name].cast(pa.string()))
            elif len(types.get(name, ())) > 1 and column_kind(table[name].type) == "number":
                table = table.set_column(place, name, table[name].cast(pa.float64(), safe=False))
        return table

    whole = pa.concat_tables([fit(table) for table in tables], promote_options="permissive").combine_chunks()
    texts = [pa.field(f.name, pa.string()) if pa.types.is_null(f.type) else f for f in whole.schema]
    return whole.cast(pa.schema(texts))


def column_kind(arrow_type: Any) -> Kind:
    """What a column of an Arrow type holds."""
    import pyarrow as pa

    if pa.types.is_boolean(arrow_type):
        return "boolean"
    return "number" if pa.types.is_integer(arrow_type) or pa.types.is_floating(arrow_type) else "text"


def matching_rows(column: Any, condition: Condition) -> Mask:
    """Which cells satisfy a condition; an empty one satisfies ``!=`` alone."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if column_kind(column.type) == "number":
        column = column.cast(pa.float64(), safe=False)  # as Qdrant compares them
    if condition.operator in ("=", "!="):
        numbers = column_kind(column.type) == "number"
        values = [float(value) for value in condition.values] if numbers else list(condition.values)
        matches = pc.is_in(column, pa.array(values, column.type))
    else:
        compare = {"<": pc.less, "<=": pc.less_equal, ">": pc.greater, ">=": pc.greater_equal}[condition.operator]
        matches = pc.fill_null(compare(column, condition.values[0]), False)
    mask: Mask = matches.to_numpy(zero_copy_only=False).astype(bool)
    return ~mask if condition.operator == "!=" else mask
