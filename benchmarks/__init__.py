"""The benchmarks behind the tables in the documentation; `genkit bench NAME` runs one of them."""
