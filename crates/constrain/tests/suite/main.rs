mod gbnf;
mod gbnf_random;
mod hostile;
mod outputs;
mod smollm2;
mod walk;
