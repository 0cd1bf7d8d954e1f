"""The generator of the sample rows: made-up companies, reports, news and questions."""
