//! The choice for a budget, where parameters and seconds are limited as well: each counts as its price, the least at which the
//! limits are kept.

use crate::divide::Choice;
use crate::driver::Frontier;
use crate::error::{Error, Result};
use crate::menu::{Item, Menu, Price};
use crate::site::Site;

/// The least and the largest price of a parameter, in nats.
const PARAMETER: (f64, f64) = (1e-15, 1.0);
/// The least and the largest price of a second, in nats: no site is worth more.
const SECOND: (f64, f64) = (1e-6, 1e9);

/// Halvings of the logarithm of a tenfold range of prices: to a quarter of a percent.
const HALVINGS: usize = 10;

impl Frontier<'_> {
    /// The best choice for a budget, within the number of parameters that may stay and the seconds that a token may take.
    pub(crate) fn choose(
        &self,
        budget: u64,
        allowed: &dyn Fn(Site, &Item) -> bool,
    ) -> Result<Choice> {
        let at = |price: Price| -> Result<Choice> {
            let division = self.divide(budget, price, allowed);
            division.at(budget).ok_or(Error::Budget {
                budget,
                smallest: division.smallest().unwrap_or(u64::MAX),
            })
        };
        let mut free = at(Price::default())?;
        // Costs that the programme rounds up may leave the dense model a few bytes beyond its own.
        let dense = |menu: &Menu| allowed(menu.site, &menu.items[menu.dense]);
        if budget >= self.bytes_of(&self.dense) && self.menus.iter().all(dense) {
            (free.items, free.predicted) = (self.dense.clone(), 0.0);
        }
        if self.meets(&free.items) {
            return Ok(free);
        }
        let few = |choice: &Choice| self.has_few_parameters(&choice.items);
        // At a price of seconds, the cheapest parameters with which there are few enough.
        let with_few = |second: f64| -> Result<Choice> {
            let priced = |parameter: f64| at(Price { parameter, second });
            let plain = priced(0.0)?;
            if few(&plain) {
                return Ok(plain);
            }
            match least_price(PARAMETER, &few, &priced)? {
                Some(choice) => Ok(choice),
                None => Err(Error::Parameters {
                    wanted: self.options.max_parameters.unwrap_or(0),
                    fewest: self.parameters_of(&priced(PARAMETER.1)?.items),
                }),
            }
        };
        let fast = |choice: &Choice| self.is_fast(&choice.items);
        let plain = with_few(0.0)?;
        if fast(&plain) {
            return Ok(plain);
        }
        match least_price(SECOND, &fast, &with_few)? {
            Some(choice) => Ok(choice),
            None => {
                let fastest = with_few(SECOND.1)?;
                Err(Error::Speed {
                    wanted: self.options.tokens_per_second.unwrap_or(0.0),
                    fastest: 1.0 / self.seconds_of(&fastest.items),
                })
            }
        }
    }

    /// Whether a choice has few enough parameters and is fast enough.
    pub(crate) fn meets(&self, items: &[usize]) -> bool {
        self.has_few_parameters(items) && self.is_fast(items)
    }

    fn has_few_parameters(&self, items: &[usize]) -> bool {
        let most = self.options.max_parameters;
        most.is_none_or(|most| self.parameters_of(items) <= most)
    }

    fn is_fast(&self, items: &[usize]) -> bool {
        let least = self.options.tokens_per_second;
        least.is_none_or(|least| self.seconds_of(items) * least <= 1.0)
    }

    /// Seconds of a decoded token by the table.
    pub(crate) fn seconds_of(&self, items: &[usize]) -> f64 {
        let of = self.menus.iter().zip(items);
        let of_sites: f64 = of.map(|(menu, &item)| menu.items[item].seconds).sum();
        self.fixed_seconds + of_sites
    }

    /// Parameters of the result, factors and what no treatment changes included.
    pub(crate) fn parameters_of(&self, items: &[usize]) -> u64 {
        let of = self.menus.iter().zip(items);
        let of_sites: u64 = of.map(|(menu, &item)| menu.items[item].parameters).sum();
        self.fixed_parameters + of_sites
    }
}

/// The choice at the least price, of those between two, at which it fits; `None` where none does.
fn least_price(
    (least, most): (f64, f64),
    fits: &dyn Fn(&Choice) -> bool,
    at: &dyn Fn(f64) -> Result<Choice>,
) -> Result<Option<Choice>> {
    // By tenfold and halving of its logarithm.
    let (mut low, mut high) = (least, least);
    let mut best = loop {
        high *= 10.0;
        let choice = at(high)?;
        if fits(&choice) {
            break choice;
        }
        low = high;
        if high > most {
            return Ok(None);
        }
    };
    for _ in 0..HALVINGS {
        let middle = (low * high).sqrt();
        let choice = at(middle)?;
        match fits(&choice) {
            true => (high, best) = (middle, choice),
            false => low = middle,
        }
    }
    Ok(Some(best))
}
