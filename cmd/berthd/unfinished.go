package main

import (
	"github.com/berthd/berth/cri/admin/api"
	"github.com/berthd/berth/sandbox"
	"github.com/berthd/berth/store"
)

// unfinished tells what the book has as begun and not as done, while no berthd runs. It
// changes nothing.
func unfinished(src source, tell func(api.Record)) (err error) {
	c, err := src.load()
	if err != nil {
		return err
	}
	book, err := store.Inspect(c.book())
	if err != nil {
		return err
	}
	defer join(&err, book.Close)
	list, err := sandbox.Unfinished(book)
	for _, o := range list {
		tell(api.Record{Op: &api.Op{Kind: api.KindUnfinished, What: o.Verb, Object: o.Object, Name: o.Name, Step: o.Step, Began: o.Began, Age: o.Age, StepAge: o.Age}})
	}
	return err
}
