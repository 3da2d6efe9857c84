//! The models that can be served.

use crate::clock::UnixMs;
use crate::database::{Control, Stop};
use crate::error::{Error, Result};
use crate::sql::{Fault, Row, values};

/// Models that are known at once.
const MODELS_MAX: usize = 10_000;

/// What a model was trained to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ModelKind {
    /// Continues a text.
    Base,
    /// Answers in a conversation.
    Chat,
}

impl ModelKind {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Base => "base",
            Self::Chat => "chat",
        }
    }
}

/// A model by its name in the API.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Model {
    pub name: String,
    pub kind: ModelKind,
    /// A bundle's prefix in the store (`models/sotu`), or a path.
    pub source: String,
    pub created_at: UnixMs,
}

impl Control {
    /// Adds a model, or replaces the one of the same name.
    pub fn put_model(&self, name: &str, kind: ModelKind, source: &str) -> Result<Model> {
        check_name("model name", name)?;
        if source.is_empty() || source.len() > 4096 || source.contains('\0') {
            return Err(Error::Invalid {
                what: "model source",
                why: "it must have 1 to 4096 bytes and no zero byte".to_owned(),
            });
        }
        let model = Model { name: name.to_owned(), kind, source: source.to_owned(), created_at: self.now() };
        self.write("put a model", |transaction| {
            let n_others =
                transaction.number("SELECT count(*) FROM models WHERE name <> ?1", values![name])?;
            if usize::try_from(n_others).is_ok_and(|n| n >= MODELS_MAX) {
                return Err(Stop::Refused(Error::TooMany { what: "models", max: MODELS_MAX }));
            }
            transaction.execute(
                "INSERT INTO models (name, kind, source, created_ms) VALUES (?1, ?2, ?3, ?4)
                 ON CONFLICT (name) DO UPDATE
                 SET kind = excluded.kind, source = excluded.source, created_ms = excluded.created_ms",
                values![name, kind.as_str(), source, model.created_at.0],
            )?;
            Ok(())
        })?;
        Ok(model)
    }

    pub fn get_model(&self, name: &str) -> Result<Option<Model>> {
        self.read("read a model", |transaction| {
            let sql = "SELECT name, kind, source, created_ms FROM models WHERE name = ?1";
            Ok(transaction.row(sql, values![name])?.as_ref().map(model).transpose()?)
        })
    }

    /// All models, by name.
    pub fn list_models(&self) -> Result<Vec<Model>> {
        self.read("list models", |transaction| {
            let rows =
                transaction.rows("SELECT name, kind, source, created_ms FROM models ORDER BY name", &[])?;
            Ok(rows.iter().map(model).collect::<Result<_, _>>()?)
        })
    }

    /// Forgets a model; its files stay. `false` when there was none.
    pub fn delete_model(&self, name: &str) -> Result<bool> {
        self.write("delete a model", |transaction| {
            Ok(transaction.execute("DELETE FROM models WHERE name = ?1", values![name])? == 1)
        })
    }
}

fn model(row: &Row) -> Result<Model, Fault> {
    let kind = match row.text(1)? {
        "base" => ModelKind::Base,
        "chat" => ModelKind::Chat,
        other => return Err(Fault::unknown_word(1, other)),
    };
    let (name, source) = (row.text(0)?.to_owned(), row.text(2)?.to_owned());
    Ok(Model { name, kind, source, created_at: UnixMs(row.int(3)?) })
}

/// Names of models and jobs appear in URLs, paths and labels.
pub(crate) fn check_name(what: &'static str, name: &str) -> Result<()> {
    let allowed = |c: char| c.is_ascii_alphanumeric() || "._-:@/+".contains(c);
    if name.is_empty() || name.len() > 128 || !name.chars().all(allowed) {
        return Err(Error::Invalid {
            what,
            why: format!(
                "{:?} must have 1 to 128 characters out of A-Z a-z 0-9 . _ - : @ / +",
                name.chars().take(40).collect::<String>()
            ),
        });
    }
    Ok(())
}
