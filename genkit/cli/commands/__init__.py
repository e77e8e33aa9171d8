"""The commands of `genkit`, a module each with `main(argv)`, imported only when called: `genkit --help` is instant."""
