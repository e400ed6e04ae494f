"""The Triton backend: what the compiler makes of it (`compile`), and what a GPU does (`suite`)."""
