//! The metadata of an open file, with typed access.
//!
//! Nothing is decoded before it is asked for: the hundred thousand strings of a vocabulary stay in the mapped file.

use std::path::Path;

use super::error::shown;
use super::header::{Entry, Header};
use super::value::{Strings, Value};
use super::{Array, GgufError, ValueType};
use crate::error::{Error, Result};

/// Keys and values of a file. For a split model: of its first part.
#[derive(Debug, Clone, Copy)]
pub struct Metadata<'a> {
    pub(crate) path: &'a Path,
    pub(crate) file: &'a [u8],
    pub(crate) header: &'a Header,
}

impl<'a> Metadata<'a> {
    /// All keys, in the order of the file.
    pub fn keys(&self) -> impl Iterator<Item = &'a str> {
        let Self { file, header, .. } = *self;
        header.entries.iter().map(move |entry| key(file, entry))
    }

    /// Whether there is such a key.
    pub fn contains(&self, key: &str) -> bool {
        self.entry(key).is_some()
    }

    /// The type of a value, and for arrays of their elements.
    pub fn value_type(&self, key: &str) -> Option<(ValueType, Option<ValueType>)> {
        let entry = self.entry(key)?;
        Some((entry.ty, entry.array.map(|(element, _)| element)))
    }

    /// Number of elements of an array.
    ///
    /// # Errors
    /// [`GgufError::Value`] if it is no array.
    pub fn len_of(&self, key: &str) -> Result<Option<usize>> {
        self.typed(key, "an array", |entry, _| {
            entry.array.map(|(_, count)| count as usize)
        })
    }

    /// A value, decoded whole.
    ///
    /// # Errors
    /// [`GgufError::Value`] for strings that are not UTF-8.
    pub fn get(&self, key: &str) -> Result<Option<Value>> {
        self.typed(key, "strings of UTF-8", |entry, bytes| match entry.array {
            None => Value::decode(entry.ty, bytes),
            Some((element, count)) => Array::decode(element, count, bytes).map(Value::Array),
        })
    }

    /// A number of any integer type.
    ///
    /// # Errors
    /// [`GgufError::Value`] for another type or a negative number.
    pub fn get_u64(&self, key: &str) -> Result<Option<u64>> {
        self.typed(key, "a number without sign", |entry, bytes| {
            unsigned(&Value::decode(entry.ty, bytes)?)
        })
    }

    /// A number of any integer type, as `usize`.
    ///
    /// # Errors
    /// As [`Metadata::get_u64`].
    pub fn get_usize(&self, key: &str) -> Result<Option<usize>> {
        self.typed(key, "a number without sign", |entry, bytes| {
            usize::try_from(unsigned(&Value::decode(entry.ty, bytes)?)?).ok()
        })
    }

    /// A float. One of 32 bits is taken as the shortest decimal that rounds to it, so that an epsilon written as 1e-5
    /// is 1e-5 and not 9.99999974737875e-6.
    ///
    /// # Errors
    /// [`GgufError::Value`] for another type, NaN and infinities.
    pub fn get_f64(&self, key: &str) -> Result<Option<f64>> {
        self.typed(key, "a finite float", |entry, bytes| {
            let value = match Value::decode(entry.ty, bytes)? {
                Value::F32(value) => value.to_string().parse().ok()?,
                Value::F64(value) => value,
                _ => return None,
            };
            Some(value).filter(|value: &f64| value.is_finite())
        })
    }

    /// A boolean.
    ///
    /// # Errors
    /// [`GgufError::Value`] for another type.
    pub fn get_bool(&self, key: &str) -> Result<Option<bool>> {
        self.typed(key, "a boolean", |entry, bytes| {
            match Value::decode(entry.ty, bytes)? {
                Value::Bool(value) => Some(value),
                _ => None,
            }
        })
    }

    /// A string.
    ///
    /// # Errors
    /// [`GgufError::Value`] for another type and for bytes that are not UTF-8.
    pub fn get_str(&self, key: &str) -> Result<Option<&'a str>> {
        self.typed(key, "a string of UTF-8", |entry, bytes| {
            (entry.ty == ValueType::String)
                .then(|| std::str::from_utf8(bytes).ok())
                .flatten()
        })
    }

    /// One number for each of `count` things: a list of that length, or a single number that holds for all of them.
    ///
    /// # Errors
    /// [`GgufError::Value`] for another type or length, and for negative numbers.
    pub fn get_usizes(&self, key: &str, count: usize) -> Result<Option<Vec<usize>>> {
        let expected = format!("a number, or a list of {count}, without sign");
        self.typed(key, &expected, |entry, bytes| match entry.array {
            None => {
                let value = unsigned(&Value::decode(entry.ty, bytes)?)?;
                Some(vec![usize::try_from(value).ok()?; count])
            }
            Some((element, found)) if found == count as u64 => {
                let size = element.bytes()? as usize;
                bytes
                    .chunks_exact(size)
                    .map(|bytes| usize::try_from(unsigned(&Value::decode(element, bytes)?)?).ok())
                    .collect()
            }
            Some(_) => None,
        })
    }

    /// A list of strings.
    ///
    /// # Errors
    /// [`GgufError::Value`] for another type and for bytes that are not UTF-8.
    pub fn get_strings(&self, key: &str) -> Result<Option<Vec<&'a str>>> {
        self.typed(
            key,
            "a list of strings of UTF-8",
            |entry, bytes| match entry.array {
                Some((ValueType::String, count)) => Strings::new(count, bytes)
                    .map(|bytes| std::str::from_utf8(bytes).ok())
                    .collect(),
                _ => None,
            },
        )
    }

    /// A list of floats of 32 bits.
    ///
    /// # Errors
    /// [`GgufError::Value`] for another type.
    pub fn get_f32s(&self, key: &str) -> Result<Option<Vec<f32>>> {
        self.typed(key, "a list of f32", |entry, bytes| {
            match Array::decode(entry.array?.0, entry.array?.1, bytes)? {
                Array::F32(list) => Some(list),
                _ => None,
            }
        })
    }

    /// A list of integers of 32 bits.
    ///
    /// # Errors
    /// [`GgufError::Value`] for another type and for numbers of more bits.
    pub fn get_i32s(&self, key: &str) -> Result<Option<Vec<i32>>> {
        self.typed(key, "a list of i32", |entry, bytes| {
            match Array::decode(entry.array?.0, entry.array?.1, bytes)? {
                Array::I32(list) => Some(list),
                Array::U32(list) => list.into_iter().map(|x| i32::try_from(x).ok()).collect(),
                _ => None,
            }
        })
    }

    /// A value that must be there: `metadata.required("llama.block_count", Metadata::get_usize)`.
    ///
    /// # Errors
    /// [`GgufError::MissingKey`], and what `get` reports.
    pub fn required<T>(
        &self,
        key: &str,
        get: impl FnOnce(&Self, &str) -> Result<Option<T>>,
    ) -> Result<T> {
        get(self, key)?.ok_or_else(|| {
            self.error(GgufError::MissingKey {
                key: shown(key.as_bytes()),
            })
        })
    }

    /// An error about this file.
    pub fn error(&self, source: GgufError) -> Error {
        Error::Gguf {
            file: self.path.to_path_buf(),
            source,
        }
    }

    fn entry(&self, wanted: &str) -> Option<&'a Entry> {
        let Self { file, header, .. } = *self;
        let found = header
            .order
            .binary_search_by_key(&wanted, |&entry| key(file, &header.entries[entry]));
        found.ok().map(|found| &header.entries[header.order[found]])
    }

    /// The value under `key` as `read` takes it from its bytes; `None` from `read` means another kind.
    fn typed<T>(
        &self,
        key: &str,
        expected: &str,
        read: impl FnOnce(&Entry, &'a [u8]) -> Option<T>,
    ) -> Result<Option<T>> {
        let Some(entry) = self.entry(key) else {
            return Ok(None);
        };
        let file: &'a [u8] = self.file;
        match read(entry, &file[entry.value.clone()]) {
            Some(value) => Ok(Some(value)),
            None => Err(self.error(GgufError::Value {
                key: shown(key.as_bytes()),
                expected: expected.to_string(),
                found: self.describe(entry),
            })),
        }
    }

    /// What stands there, in a few words.
    fn describe(&self, entry: &Entry) -> String {
        let bytes = &self.file[entry.value.clone()];
        match (entry.array, entry.ty) {
            (Some((element, count)), _) => format!("a list of {count} {}", element.name()),
            (None, ValueType::String) => {
                let text: String = String::from_utf8_lossy(bytes).chars().take(40).collect();
                format!("the string {text:?}")
            }
            (None, ty) => match Value::decode(ty, bytes) {
                Some(value) => format!("{value:?}"),
                None => ty.name().to_string(),
            },
        }
    }
}

fn key<'a>(file: &'a [u8], entry: &Entry) -> &'a str {
    // Opening has checked that keys are UTF-8.
    std::str::from_utf8(&file[entry.key.clone()]).unwrap_or_default()
}

fn unsigned(value: &Value) -> Option<u64> {
    match *value {
        Value::U8(x) => Some(x.into()),
        Value::U16(x) => Some(x.into()),
        Value::U32(x) => Some(x.into()),
        Value::U64(x) => Some(x),
        Value::I8(x) => x.try_into().ok(),
        Value::I16(x) => x.try_into().ok(),
        Value::I32(x) => x.try_into().ok(),
        Value::I64(x) => x.try_into().ok(),
        _ => None,
    }
}
