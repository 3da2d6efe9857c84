use std::fs::File;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

use parquet::basic::{ConvertedType, Type};
use parquet::column::reader::{ColumnReaderImpl, get_typed_column_reader};
use parquet::data_type::{ByteArray, ByteArrayType};
use parquet::errors::ParquetError;
use parquet::file::reader::{FileReader, SerializedFileReader};

use super::Rows;
use crate::error::Place;
use crate::{Error, ReadOptions, Result};

/// Rows decoded at a time.
const BATCH_ROWS: usize = 64;

/// One column of strings of a Parquet file, row group by row group.
pub(super) struct ParquetRows {
    path: PathBuf,
    file: SerializedFileReader<File>,
    column_idx: usize,
    /// 1 where values may be null, else 0.
    def_level_max: i16,
    bytes_max: usize,
    next_group: usize,
    column: Option<ColumnReaderImpl<ByteArrayType>>,
    /// Decoded rows in reverse; `None` is null.
    batch: Vec<Option<ByteArray>>,
    n_rows: u64,
}

impl ParquetRows {
    pub(super) fn new(path: &Path, file: File, options: &ReadOptions) -> Result<ParquetRows> {
        let fail = |reason: String| Error::Parquet { path: path.to_path_buf(), reason };
        let file = guarded(path, || SerializedFileReader::new(file))?;
        let schema = file.metadata().file_metadata().schema_descr_ptr();
        let wanted =
            |column: &&parquet::schema::types::ColumnDescPtr| column.path().string() == options.text_field;
        let Some(column) = schema.columns().iter().find(wanted) else {
            let names: Vec<_> =
                schema.columns().iter().take(20).map(|column| column.path().string()).collect();
            return Err(fail(format!("no column {:?}; it has {}", options.text_field, names.join(", "))));
        };
        let is_text = matches!(column.converted_type(), ConvertedType::UTF8 | ConvertedType::NONE);
        if column.physical_type() != Type::BYTE_ARRAY || !is_text || column.max_rep_level() > 0 {
            return Err(fail(format!("column {:?} does not hold one string a row", options.text_field)));
        }
        let def_level_max = column.max_def_level();
        let column_idx = schema.columns().iter().position(|c| c.path() == column.path()).unwrap_or(0);
        Ok(ParquetRows {
            path: path.to_path_buf(),
            file,
            column_idx,
            def_level_max,
            bytes_max: options.document_bytes_max,
            next_group: 0,
            column: None,
            batch: Vec::new(),
            n_rows: 0,
        })
    }

    fn next(&mut self) -> Result<Option<(u64, String)>> {
        while self.batch.is_empty() {
            let path = self.path.clone();
            match guarded(&path, || self.fill()) {
                Ok(true) => {}
                Ok(false) => return Ok(None),
                Err(error) => {
                    (self.column, self.next_group) = (None, usize::MAX);
                    return Err(error);
                }
            }
        }
        let value = self.batch.pop().flatten();
        self.n_rows += 1;
        let fail = |reason: &str| Error::row(&self.path, Place::Row(self.n_rows), reason);
        // A null is a row without text, as an empty one is.
        let bytes = value.as_ref().map_or(&[][..], ByteArray::data);
        if bytes.len() > self.bytes_max {
            return Err(fail(&format!("longer than {} bytes", self.bytes_max)));
        }
        let text = std::str::from_utf8(bytes).map_err(|_| fail("not UTF-8"))?;
        Ok(Some((self.n_rows, text.to_string())))
    }

    /// Decodes some rows; false at the end of the file.
    fn fill(&mut self) -> Result<bool, ParquetError> {
        let Some(column) = &mut self.column else {
            if self.next_group >= self.file.num_row_groups() {
                return Ok(false);
            }
            let group = self.file.get_row_group(self.next_group)?;
            self.next_group += 1;
            self.column = Some(get_typed_column_reader(group.get_column_reader(self.column_idx)?));
            return Ok(true);
        };
        let (mut def_levels, mut values) = (Vec::new(), Vec::new());
        let (n_rows, _, _) = column.read_records(BATCH_ROWS, Some(&mut def_levels), None, &mut values)?;
        if n_rows == 0 {
            self.column = None;
            return Ok(true);
        }
        let mut values = values.into_iter();
        let is_present = |row: usize| def_levels.get(row).is_none_or(|&level| level == self.def_level_max);
        self.batch = (0..n_rows).map(|row| if is_present(row) { values.next() } else { None }).collect();
        self.batch.reverse();
        Ok(true)
    }
}

/// Runs the Parquet crate's code, which asserts some of what a file claims (a negative offset, for one): its panics are
/// errors in the file. What it worked on is not used again after one.
fn guarded<T>(path: &Path, work: impl FnOnce() -> Result<T, ParquetError>) -> Result<T> {
    let reason = match catch_unwind(AssertUnwindSafe(work)) {
        Ok(Ok(done)) => return Ok(done),
        Ok(Err(error)) => error.to_string(),
        Err(_) => "it contradicts itself".to_string(),
    };
    Err(Error::Parquet { path: path.to_path_buf(), reason })
}

impl Rows for ParquetRows {
    fn next_row(&mut self) -> Option<Result<(u64, String)>> {
        self.next().transpose()
    }
}
