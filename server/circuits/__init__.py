"""Circuits in the web: questions and answers, strongest paths, drawings, and the form for circuit-tracer's viewer. No torch."""
