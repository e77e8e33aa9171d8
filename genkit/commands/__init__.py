"""The commands of `genkit`, a module each with `main(argv)`. Imported only when called, so `genkit --help` is instant."""
