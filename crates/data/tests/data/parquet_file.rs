//! Parquet files for the tests, written with the low-level writer.

use std::path::Path;
use std::sync::Arc;

use parquet::basic::Compression;
use parquet::data_type::{ByteArray, ByteArrayType, Int64Type};
use parquet::file::properties::WriterProperties;
use parquet::file::writer::SerializedFileWriter;
use parquet::schema::parser::parse_message_type;

/// A file with the columns `id` and `text`, a row group for each slice of rows; `None` is null.
pub(crate) fn write(path: &Path, groups: &[&[Option<&str>]], compression: Compression) {
    let schema = "message schema { required int64 id; optional binary text (UTF8); }";
    let schema = Arc::new(parse_message_type(schema).unwrap());
    let properties = Arc::new(WriterProperties::builder().set_compression(compression).build());
    let file = std::fs::File::create(path).unwrap();
    let mut writer = SerializedFileWriter::new(file, schema, properties).unwrap();
    for rows in groups {
        let mut group = writer.next_row_group().unwrap();
        let mut id = group.next_column().unwrap().unwrap();
        let ids: Vec<i64> = (0..rows.len() as i64).collect();
        id.typed::<Int64Type>().write_batch(&ids, None, None).unwrap();
        id.close().unwrap();
        let mut text = group.next_column().unwrap().unwrap();
        let values: Vec<ByteArray> = rows.iter().flatten().map(|&text| ByteArray::from(text)).collect();
        let def_levels: Vec<i16> = rows.iter().map(|row| i16::from(row.is_some())).collect();
        text.typed::<ByteArrayType>().write_batch(&values, Some(&def_levels), None).unwrap();
        text.close().unwrap();
        group.close().unwrap();
    }
    writer.close().unwrap();
}
