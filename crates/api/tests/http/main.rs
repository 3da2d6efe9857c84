//! The HTTP surface from outside: answers, refusals, connections, and the shapes of the OpenAI specification.

mod adapters;
mod answers;
mod bad_inputs;
mod client;
mod cluster;
mod connections;
mod embeddings;
mod fake;
mod openapi;
mod replicas;
mod specification;
mod structured;
mod tls;
mod tokenize;
mod tools;
