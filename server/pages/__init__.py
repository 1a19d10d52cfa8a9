"""One file per page kind: door, validate, fetch, render. Imports store and rendering; never tables, never torch."""
