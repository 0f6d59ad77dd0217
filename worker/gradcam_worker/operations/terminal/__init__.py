"""What commands print: tables, colours, progress. Begin at `console`."""
