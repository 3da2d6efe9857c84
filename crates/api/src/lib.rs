//! The HTTP surface: OpenAI endpoints, keys, limits, the console's files.
