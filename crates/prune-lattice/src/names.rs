//! Enums whose variants have names: one table gives the variants, `ALL`, `name`, parsing and serde.

macro_rules! named {
    (
        $(#[$meta:meta])*
        pub enum $type:ident as $kind:literal {
            $($(#[$doc:meta])* $variant:ident = $name:literal,)+
        }
    ) => {
        $(#[$meta])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, serde::Serialize, serde::Deserialize)]
        #[non_exhaustive]
        pub enum $type {
            $($(#[$doc])* #[serde(rename = $name)] $variant,)+
        }

        impl $type {
            /// All of them.
            pub const ALL: &'static [$type] = &[$($type::$variant),+];

            /// All names, separated by commas.
            pub fn names() -> String {
                let names: Vec<&str> = Self::ALL.iter().map(|v| v.name()).collect();
                names.join(", ")
            }

            /// Its name, as on command lines, in reports and in JSON.
            pub fn name(self) -> &'static str {
                match self {
                    $($type::$variant => $name,)+
                }
            }
        }

        impl std::fmt::Display for $type {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.pad(self.name())
            }
        }

        impl std::str::FromStr for $type {
            type Err = crate::error::Error;
            fn from_str(name: &str) -> crate::error::Result<Self> {
                $type::ALL.iter().copied().find(|v| v.name() == name).ok_or_else(|| {
                    crate::error::Error::UnknownName {
                        kind: $kind,
                        name: name.into(),
                        expected: Self::names(),
                    }
                })
            }
        }
    };
}

/// A change of some fields of a struct that cannot be written as a literal outside this crate.
macro_rules! with {
    ($($type:ty),+) => {
        $(impl $type {
            /// The same with some fields changed: `config.with(|c| c.seed = 3)`.
            #[must_use]
            pub fn with(mut self, change: impl FnOnce(&mut Self)) -> Self {
                change(&mut self);
                self
            }
        })+
    };
}

pub(crate) use {named, with};
