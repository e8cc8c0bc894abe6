"""Files of others -> rows: JSON, CSV and Parquet files, folders and the hub, one bad row at a time."""

from megatron_tide.tables.arrow import ArrowTable
from megatron_tide.tables.messages import (
    AS_WRITTEN,
    ASSISTANT,
    BESIDE,
    LONGEST_TEXT,
    MEDIA,
    THOUGHTS,
    Message,
    conversation,
    parse_messages,
)
from megatron_tide.tables.table import (
    UNREADABLE_SHARE,
    Table,
    TextTable,
    check_bad,
    good_rows,
    open_table,
    read_rows,
)

__all__ = [
    "ASSISTANT",
    "AS_WRITTEN",
    "BESIDE",
    "LONGEST_TEXT",
    "MEDIA",
    "THOUGHTS",
    "UNREADABLE_SHARE",
    "ArrowTable",
    "Message",
    "Table",
    "TextTable",
    "check_bad",
    "conversation",
    "good_rows",
    "open_table",
    "parse_messages",
    "read_rows",
]
