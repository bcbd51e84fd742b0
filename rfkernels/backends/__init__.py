"""One package per backend; every op is a module of the same name in each of them."""
