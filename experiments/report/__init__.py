"""The report: rows of the comparison become figures, tables and one page. It runs nothing that is compared."""
