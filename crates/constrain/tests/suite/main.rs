mod hostile;
mod outputs;
mod walk;
