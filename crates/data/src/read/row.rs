use std::fmt;

use serde::de::{DeserializeSeed, Deserializer, Error as _, IgnoredAny, MapAccess, Visitor};

use crate::{Content, ReadOptions, chat};

/// What is taken out of a JSON row.
pub(super) struct RowParser {
    content: Content,
    text_field: String,
}

impl RowParser {
    pub(super) fn new(options: &ReadOptions) -> RowParser {
        RowParser { content: options.content, text_field: options.text_field.clone() }
    }

    /// The document's text, or what is wrong with the row.
    pub(super) fn parse(&self, json: &str) -> Result<String, String> {
        match self.content {
            Content::Text => parse_row(json, &self.text_field),
            Content::Chats(form) => chat::read(json, form).map(|_| json.to_owned()),
        }
    }
}

/// The text of a JSON row: the row itself where it is a string, else its field `text_field`.
fn parse_row(json: &str, text_field: &str) -> Result<String, String> {
    let mut deserializer = serde_json::Deserializer::from_str(json);
    let text = RowText { text_field }.deserialize(&mut deserializer);
    // serde_json counts lines within the row; the caller names the line in the file.
    let text = text.and_then(|text| deserializer.end().map(|()| text));
    text.map_err(|error| error.to_string().replace(" at line 1 column ", ", column "))
}

/// Takes the one field out of an object and reads past the others without building them.
struct RowText<'a> {
    text_field: &'a str,
}

impl<'de> DeserializeSeed<'de> for RowText<'_> {
    type Value = String;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<String, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for RowText<'_> {
    type Value = String;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "a string or an object with a string field {:?}", self.text_field)
    }

    fn visit_str<E>(self, text: &str) -> Result<String, E> {
        Ok(text.to_string())
    }

    fn visit_string<E>(self, text: String) -> Result<String, E> {
        Ok(text)
    }

    fn visit_map<M: MapAccess<'de>>(self, mut map: M) -> Result<String, M::Error> {
        let mut text = None;
        while let Some(field) = map.next_key::<String>()? {
            if field != self.text_field {
                map.next_value::<IgnoredAny>()?;
            } else if text.replace(map.next_value::<String>()?).is_some() {
                return Err(M::Error::custom(format!("two fields {:?}", self.text_field)));
            }
        }
        text.ok_or_else(|| M::Error::custom(format!("no field {:?}", self.text_field)))
    }
}
