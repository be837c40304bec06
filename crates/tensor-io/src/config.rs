//! `config.json`: every field kept, in order, with typed access.
//!
//! A model's configuration is an open set of fields, and unknown ones must round-trip unchanged. So it stays JSON; code that needs
//! a field asks for it by kind, and the error says which file, which field and what stands there instead.

use std::fs;
use std::io::ErrorKind;
use std::path::Path;

use serde_json::{Map, Value};

use crate::error::{Error, Result};
use crate::text::without_mark;

/// File name of the configuration in a checkpoint folder.
pub const CONFIG_FILE: &str = "config.json";

/// A model's configuration: a JSON object with typed access to its fields.
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    fields: Map<String, Value>,
    /// What errors call this configuration: its file, and the section within it.
    origin: String,
    section: String,
}

impl Config {
    /// A configuration that does not come from a file.
    pub fn new(fields: Map<String, Value>) -> Self {
        Self {
            fields,
            origin: "config".to_string(),
            section: String::new(),
        }
    }

    /// Reads `config.json`, or another file with a JSON object in it.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::ConfigJson`], [`Error::ConfigNotObject`].
    pub fn read(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let bytes = fs::read(path).map_err(Error::io("read", path))?;
        Self::parse(&bytes, path)
    }

    /// Reads the configuration of a checkpoint folder without opening its weights.
    ///
    /// # Errors
    /// [`Error::MissingConfig`] where the folder has none, else as [`Config::read`].
    pub fn read_folder(dir: impl AsRef<Path>) -> Result<Self> {
        let dir = dir.as_ref();
        match Self::read(dir.join(CONFIG_FILE)) {
            Err(Error::Io { source, .. }) if source.kind() == ErrorKind::NotFound => {
                Err(Error::MissingConfig {
                    dir: dir.to_path_buf(),
                })
            }
            result => result,
        }
    }

    fn parse(bytes: &[u8], path: &Path) -> Result<Self> {
        match serde_json::from_slice(without_mark(bytes)) {
            Ok(Value::Object(fields)) => Ok(Self {
                fields,
                origin: path.display().to_string(),
                section: String::new(),
            }),
            Ok(other) => Err(Error::ConfigNotObject {
                path: path.to_path_buf(),
                found: kind(&other),
            }),
            Err(source) => Err(Error::ConfigJson {
                path: path.to_path_buf(),
                source,
            }),
        }
    }

    /// All fields.
    pub fn raw(&self) -> &Map<String, Value> {
        &self.fields
    }

    /// A field as JSON; None if it is absent or null, which configurations use alike.
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.fields.get(key).filter(|value| !value.is_null())
    }

    /// Sets a field, in its old place if there was one, else at the end.
    pub fn set(&mut self, key: impl Into<String>, value: impl Into<Value>) {
        self.fields.insert(key.into(), value.into());
    }

    /// Removes a field, keeping the order of the others.
    pub fn remove(&mut self, key: &str) -> Option<Value> {
        self.fields.shift_remove(key)
    }

    /// A field that counts something.
    ///
    /// # Errors
    /// [`Error::ConfigField`] if it is absent, null or no such number; so too the other getters.
    pub fn usize(&self, key: &str) -> Result<usize> {
        self.required(key, USIZE, as_usize)
    }

    /// A field with a number.
    ///
    /// # Errors
    /// [`Error::ConfigField`].
    pub fn f64(&self, key: &str) -> Result<f64> {
        self.required(key, NUMBER, Value::as_f64)
    }

    /// A field that is true or false.
    ///
    /// # Errors
    /// [`Error::ConfigField`].
    pub fn bool(&self, key: &str) -> Result<bool> {
        self.required(key, BOOL, Value::as_bool)
    }

    /// A field with text.
    ///
    /// # Errors
    /// [`Error::ConfigField`].
    pub fn str(&self, key: &str) -> Result<&str> {
        self.required(key, STRING, Value::as_str)
    }

    /// A field with a list of counts, for instance one per layer.
    ///
    /// # Errors
    /// [`Error::ConfigField`].
    pub fn usizes(&self, key: &str) -> Result<Vec<usize>> {
        self.required(key, USIZES, as_usizes)
    }

    /// A field that is an object, as a configuration of its own; its errors name the fields as `key.field`.
    ///
    /// # Errors
    /// [`Error::ConfigField`].
    pub fn section(&self, key: &str) -> Result<Self> {
        let fields = self.required(key, OBJECT, Value::as_object)?;
        Ok(self.subsection(key, fields))
    }

    /// As [`Config::usize`]; None if the field is absent or null.
    ///
    /// # Errors
    /// [`Error::ConfigField`] if it is of another kind; so too the other optional getters.
    pub fn opt_usize(&self, key: &str) -> Result<Option<usize>> {
        self.optional(key, USIZE, as_usize)
    }

    /// As [`Config::f64`]; None if the field is absent or null.
    ///
    /// # Errors
    /// [`Error::ConfigField`].
    pub fn opt_f64(&self, key: &str) -> Result<Option<f64>> {
        self.optional(key, NUMBER, Value::as_f64)
    }

    /// As [`Config::bool`]; None if the field is absent or null.
    ///
    /// # Errors
    /// [`Error::ConfigField`].
    pub fn opt_bool(&self, key: &str) -> Result<Option<bool>> {
        self.optional(key, BOOL, Value::as_bool)
    }

    /// As [`Config::str`]; None if the field is absent or null.
    ///
    /// # Errors
    /// [`Error::ConfigField`].
    pub fn opt_str(&self, key: &str) -> Result<Option<&str>> {
        self.optional(key, STRING, Value::as_str)
    }

    /// As [`Config::usizes`]; None if the field is absent or null.
    ///
    /// # Errors
    /// [`Error::ConfigField`].
    pub fn opt_usizes(&self, key: &str) -> Result<Option<Vec<usize>>> {
        self.optional(key, USIZES, as_usizes)
    }

    /// As [`Config::section`]; None if the field is absent or null.
    ///
    /// # Errors
    /// [`Error::ConfigField`].
    pub fn opt_section(&self, key: &str) -> Result<Option<Self>> {
        let fields = self.optional(key, OBJECT, Value::as_object)?;
        Ok(fields.map(|fields| self.subsection(key, fields)))
    }

    /// The error for a field whose value is of the right kind but not one that the caller can use.
    pub fn unexpected(&self, key: &str, expected: &'static str) -> Error {
        Error::ConfigField {
            origin: self.origin.clone(),
            key: format!("{}{key}", self.section),
            expected,
            found: match self.fields.get(key) {
                None => "nothing".to_string(),
                Some(Value::Array(_)) => "an array".to_string(),
                Some(Value::Object(_)) => "an object".to_string(),
                Some(value) => value.to_string(),
            },
        }
    }

    /// The file as written: indented by two spaces, as the ecosystem's tools do.
    pub(crate) fn to_file_bytes(&self) -> Vec<u8> {
        let mut bytes =
            serde_json::to_vec_pretty(&self.fields).expect("a JSON object always has a JSON form");
        bytes.push(b'\n');
        bytes
    }

    fn subsection(&self, key: &str, fields: &Map<String, Value>) -> Self {
        Self {
            fields: fields.clone(),
            origin: self.origin.clone(),
            section: format!("{}{key}.", self.section),
        }
    }

    fn required<'a, T>(
        &'a self,
        key: &str,
        expected: &'static str,
        convert: impl FnOnce(&'a Value) -> Option<T>,
    ) -> Result<T> {
        self.optional(key, expected, convert)?
            .ok_or_else(|| self.unexpected(key, expected))
    }

    fn optional<'a, T>(
        &'a self,
        key: &str,
        expected: &'static str,
        convert: impl FnOnce(&'a Value) -> Option<T>,
    ) -> Result<Option<T>> {
        match self.get(key) {
            None => Ok(None),
            Some(value) => match convert(value) {
                Some(value) => Ok(Some(value)),
                None => Err(self.unexpected(key, expected)),
            },
        }
    }
}

impl Default for Config {
    fn default() -> Self {
        Self::new(Map::new())
    }
}

impl From<Map<String, Value>> for Config {
    fn from(fields: Map<String, Value>) -> Self {
        Self::new(fields)
    }
}

const USIZE: &str = "a whole number, not negative";
const USIZES: &str = "an array of whole numbers, not negative";
const NUMBER: &str = "a number";
const BOOL: &str = "true or false";
const STRING: &str = "a string";
const OBJECT: &str = "an object";

fn as_usize(value: &Value) -> Option<usize> {
    value.as_u64().and_then(|n| n.try_into().ok())
}

fn as_usizes(value: &Value) -> Option<Vec<usize>> {
    value.as_array()?.iter().map(as_usize).collect()
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "an array",
        Value::Object(_) => "an object",
    }
}
