"""What finished runs are evidence of: metrics of items, intervals, tests, tables. No torch."""
