"""Run records: what a run was, what it cost and what came out, as versioned JSON."""

from gradrank.record.run import SCHEMA, STATUSES, RunRecord, finite

__all__ = ["SCHEMA", "STATUSES", "RunRecord", "finite"]
